"""The networks of the CIFAR distillation tables, known to timm as `cifar_*` once this package is imported.

Architectures and state-dict names are those of the checkpoints that the tables (Tian et al. 2020, "Contrastive
representation distillation", ICLR) and pytorch-cifar-models publish, so that those load strictly.
"""

from models.cifar import mobilenet, resnet, shufflenet, vgg, wrn
from models.cifar.base import CifarNet

__all__ = ["CifarNet", "mobilenet", "resnet", "shufflenet", "vgg", "wrn"]
