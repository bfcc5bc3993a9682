"""Training stages as LightningModules."""

from relic.modules.autoencoder import Autoencoder
from relic.modules.base import RelicModule
from relic.modules.self_forcing import SelfForcing
from relic.modules.teacher import TeacherExtension

__all__ = ["Autoencoder", "RelicModule", "SelfForcing", "TeacherExtension"]
