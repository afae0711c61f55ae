"""The families of torchvision, each by a small member."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import detection, segmentation, video

from zoo.entries import Entry

__all__ = ["ENTRIES"]

_STAGES = ("layer1", "layer2", "layer3", "layer4", "fc")
_BODY = tuple(f"backbone.{stage}" for stage in _STAGES[:4])
_SMALL = (3, 32, 32)
_UNSTATISTICAL = frozenset({"joint"})


def _small(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(getattr(models, name), num_classes=10, **options)


def _vgg(depth: str) -> Callable[[], nn.Module]:
    """Make a VGG with BatchNorm, without the hundred million parameters of its classifier."""

    def make() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = models.VGG(nn.Identity(), init_weights=False)
        model.features = models.vgg.make_layers(models.vgg.cfgs[depth], batch_norm=True)
        model.classifier = _classifier(512 * 7 * 7)
        return model

    return make


def _alexnet() -> nn.Module:
    model: nn.Module = models.alexnet()
    model.classifier = _classifier(256 * 6 * 6)
    return model


def _classifier(width: int) -> nn.Module:
    return nn.Sequential(nn.Dropout(), nn.Linear(width, 64), nn.ReLU(inplace=True), nn.Linear(64, 10))


def _segmenter(name: str, **options: Any) -> Callable[[], nn.Module]:
    make = getattr(segmentation, name)
    return partial(make, weights=None, weights_backbone=None, num_classes=5, **options)


def _adapters() -> tuple[dict[str | int, nn.Module], dict[str | int, nn.Module]]:
    """Map between the widths of ResNet-18 and ResNet-50."""
    widths = {"layer1": (64, 256), "layer2": (128, 512), "layer3": (256, 1024), "layer4": (512, 2048)}
    followers = dict(zip(widths, _STAGES[1:4], strict=False))
    outputs: dict[str | int, nn.Module] = {path: nn.Conv2d(*pair, kernel_size=1) for path, pair in widths.items()}
    inputs: dict[str | int, nn.Module] = {
        follower: nn.Conv2d(widths[path][1], widths[path][0], kernel_size=1) for path, follower in followers.items()
    }
    return {**outputs, "fc": nn.Identity()}, inputs | {"fc": nn.Conv2d(2048, 512, kernel_size=1)}


class _Scores(nn.Module):
    """A segmentation model up to its scores, before they are resized to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = _segmenter("fcn_resnet50")()

    def forward(self, images: Tensor) -> Any:
        return self.net.classifier(self.net.backbone(images)["out"])


def _vit() -> nn.Module:
    model: nn.Module = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    # It begins with zeros, from which a student that begins alike has nothing to learn.
    nn.init.normal_(model.get_parameter("heads.head.weight"))
    return model


def _swin() -> nn.Module:
    model: nn.Module = models.SwinTransformer(
        [4, 4], 24, [2, 2, 2, 2], [1, 2, 4, 8], [2, 2], stochastic_depth_prob=0.0, num_classes=10
    )
    return model


def _maxvit() -> nn.Module:
    channels, layers = [16, 32, 64], [1, 1, 2]
    model: nn.Module = models.MaxVit(
        (64, 64), 16, 2, channels, layers, head_dim=8, stochastic_depth_prob=0.1, num_classes=10
    )
    return model


def _detector_backbone() -> nn.Module:
    detector = detection.fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None)
    backbone: nn.Module = detector.backbone
    return backbone


def _features(*ends: int, head: str = "classifier") -> tuple[str, ...]:
    return (*(f"features.{end}" for end in ends), "features", head)


_RESIZED = "what the model does behind the scores is not divided: it resizes them to the input, whose size it needs"
_AUXILIARY = "auxiliary heads get no gradient, because no block ends in them"

ENTRIES = {
    "resnet18": Entry(
        teacher=_small("resnet34"),
        student=_small("resnet18"),
        paths=_STAGES,
        shape=_SMALL,
        first_try=("layer1.0.conv1", "layer1", "fc"),
        refusal=("block 1 of the student", "Leave out `layer1.0.conv1`"),
        further=frozenset({"compile"}),
        remark="taught by resnet34",
    ),
    "resnet50": Entry(
        teacher=_small("resnet50"),
        student=_small("resnet18"),
        paths=_STAGES,
        shape=_SMALL,
        adapters=_adapters,
        remark="teaches resnet18 through adapters of 1 x 1",
    ),
    "wide_resnet50_2": Entry(
        teacher=_small("wide_resnet50_2"),
        student=_small("resnet50"),
        paths=_STAGES,
        shape=_SMALL,
        remark="teaches resnet50",
    ),
    "resnext50_32x4d": Entry(teacher=_small("resnext50_32x4d"), paths=_STAGES, shape=_SMALL),
    "vgg16_bn": Entry(
        teacher=_vgg("D"),
        student=_vgg("A"),
        paths=_features(6, 13, 23, 33),
        student_paths=_features(3, 7, 14, 21),
        shape=_SMALL,
        remark="teaches vgg11_bn, whose layers have other numbers; smaller classifier",
    ),
    "alexnet": Entry(teacher=_alexnet, paths=_features(2, 5), remark="smaller classifier"),
    "densenet121": Entry(
        teacher=_small("densenet121"),
        paths=(*(f"features.transition{number}" for number in (1, 2, 3)), "features", "classifier"),
        shape=_SMALL,
        first_try=("features.denseblock1.denselayer3", "classifier"),
        refusal=("`features.pool0`", "a boundary outside the residual block or skip connection"),
        remark="cut between dense blocks only",
    ),
    "mobilenet_v2": Entry(teacher=_small("mobilenet_v2"), paths=_features(3, 6, 13), shape=_SMALL),
    "mobilenet_v3_small": Entry(teacher=_small("mobilenet_v3_small"), paths=_features(1, 3, 8), shape=_SMALL),
    "efficientnet_b0": Entry(
        teacher=_small("efficientnet_b0"), paths=_features(2, 4, 6), shape=_SMALL, remark="stochastic depth"
    ),
    "efficientnet_v2_s": Entry(teacher=_small("efficientnet_v2_s"), paths=_features(2, 4, 6), shape=_SMALL),
    "regnet_y_400mf": Entry(
        teacher=_small("regnet_y_400mf"),
        paths=("stem", *(f"trunk_output.block{number}" for number in (1, 2, 3, 4)), "fc"),
        shape=_SMALL,
    ),
    "shufflenet_v2_x0_5": Entry(
        teacher=_small("shufflenet_v2_x0_5"), paths=("stage2", "stage3", "stage4", "fc"), shape=_SMALL
    ),
    "squeezenet1_1": Entry(
        teacher=_small("squeezenet1_1", dropout=0.0),
        paths=_features(4, 7),
        further=_UNSTATISTICAL,
        remark="without dropout",
    ),
    "googlenet": Entry(
        teacher=_small("googlenet", init_weights=False),
        paths=("maxpool2", "inception3b", "inception4e", "inception5b", "fc"),
        first_try=("maxpool2", "inception3b", "inception4e", "inception5b", ""),
        refusal=("`aux2`", "end the block map at `fc`"),
        remark=_AUXILIARY,
    ),
    "inception_v3": Entry(
        teacher=_small("inception_v3", init_weights=False, aux_logits=False),
        paths=("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c", "fc"),
        shape=(3, 75, 75),
        remark="without auxiliary head",
    ),
    "mnasnet0_5": Entry(
        teacher=_small("mnasnet0_5"), paths=("layers.8", "layers.10", "layers.12", "layers", "classifier"), shape=_SMALL
    ),
    "convnext_tiny": Entry(teacher=_small("convnext_tiny"), paths=_features(1, 3, 5), shape=_SMALL),
    "vit": Entry(
        teacher=_vit,
        paths=(*(f"encoder.layers.encoder_layer_{number}" for number in (0, 1, 2)), "encoder", "heads"),
        shape=_SMALL,
        further=frozenset({"joint", "compile"}),
        remark="`VisionTransformer` of 4 layers",
    ),
    "swin_t": Entry(
        teacher=_swin,
        paths=_features(1, 3, 5, head="head"),
        shape=_SMALL,
        further=_UNSTATISTICAL,
        remark="`SwinTransformer` of a quarter of its width",
    ),
    "swin_v2_t": Entry(teacher=_small("swin_v2_t"), paths=_features(1, 3, 5, head="head"), remark="stochastic depth"),
    "maxvit": Entry(
        teacher=_maxvit, paths=("stem", "blocks.0", "blocks.1", "blocks.2", "classifier"), remark="`MaxVit` of 4 layers"
    ),
    "fcn_resnet50": Entry(
        teacher=_segmenter("fcn_resnet50"),
        paths=(*_BODY, "classifier"),
        shape=_SMALL,
        first_try=(*_BODY, ""),
        refusal=("the model's input", "end the block map at `classifier`"),
        remark=_RESIZED,
    ),
    "fcn_resnet50, scores": Entry(
        teacher=_Scores,
        paths=(*(f"net.{path}" for path in _BODY), ""),
        shape=_SMALL,
        remark="in a module of its own that ends in the scores, as `TeacherStudentModule` needs it",
    ),
    "deeplabv3_mobilenet_v3_large": Entry(
        teacher=_segmenter("deeplabv3_mobilenet_v3_large"),
        paths=("backbone.3", "backbone.6", "backbone.12", "backbone", "classifier"),
        remark=_RESIZED,
    ),
    "lraspp_mobilenet_v3_large": Entry(
        teacher=_segmenter("lraspp_mobilenet_v3_large"),
        paths=("backbone.2", "backbone", "classifier"),
        first_try=("backbone.8", "backbone", "classifier"),
        refusal=("`backbone.4`, which is what the boundary holds", "Leave out `backbone.8`"),
        remark="the head takes two activations of the backbone; " + _RESIZED,
    ),
    "r3d_18": Entry(teacher=partial(video.r3d_18, num_classes=10), paths=_STAGES, shape=(3, 4, 32, 32)),
    "swin3d_t": Entry(
        teacher=partial(video.swin3d_t, num_classes=10), paths=_features(0, 2, 4, head="head"), shape=(3, 4, 32, 32)
    ),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Entry(
        teacher=_detector_backbone,
        paths=("body", "fpn"),
        first_try=("body.3", "body", "fpn"),
        refusal=("whose keys are names", "the keys '0', '1'"),
        remark="its `backbone`; the whole detector decides by values, and is refused",
    ),
}
