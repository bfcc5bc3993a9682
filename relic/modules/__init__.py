"""Training stages as LightningModules."""

from relic.modules.autoencoder import Autoencoder
from relic.modules.base import RelicModule
from relic.modules.causal_init import CausalInit
from relic.modules.student import StudentModule
from relic.modules.teacher import TeacherExtension

__all__ = ["Autoencoder", "CausalInit", "RelicModule", "StudentModule", "TeacherExtension"]
