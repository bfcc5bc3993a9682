"""Training stages as LightningModules."""

from relic.modules.autoencoder import Autoencoder
from relic.modules.base import RelicModule
from relic.modules.teacher import TeacherExtension

__all__ = ["Autoencoder", "RelicModule", "TeacherExtension"]
