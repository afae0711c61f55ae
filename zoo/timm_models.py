"""Families of timm, each by a small member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from lightning_pipebd import CallableBlock, layer_blocks
from zoo.entries import Entry

__all__ = ["ENTRIES"]

_STAGES = ("stages.0", "stages.1", "stages.2", "stages.3", "head")


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, num_classes=10, **options)


def _staged(
    name: str,
    *paths: str,
    size: int = 64,
    further: Sequence[str] = (),
    remark: str = "",
    is_trained: bool = True,
    **options: Any,
) -> Entry:
    """A model of four stages and a head, or with the paths given; for images of any size."""
    return Entry(
        teacher=_timm(name, **options),
        paths=paths or _STAGES,
        shape=(3, size, size),
        is_trained=is_trained,
        further=frozenset(further),
        remark=remark,
    )


def _sized(name: str, *paths: str, size: int = 64, **others: Any) -> Entry:
    """The same, for images of one size that the model is made for."""
    return _staged(name, *paths, size=size, img_size=size, **others)


def _layers(count: int, *ends: str) -> tuple[str, ...]:
    """Every quarter of a list of layers, and what follows it."""
    step = count // 4
    return (*(f"blocks.{index}" for index in range(step - 1, count, step)), *ends)


def _tail(model: Any, *names: str) -> CallableBlock:
    """What a model of layers does behind the last one."""
    return CallableBlock(
        lambda hidden: model.forward_head(model.norm(hidden)), modules=[getattr(model, name) for name in names]
    )


def _vit_blocks(model: Any, example: Tensor) -> list[Any]:
    return [*layer_blocks(model, "blocks", example), _tail(model, "norm", "fc_norm", "head")]


def _xcit_blocks(model: Any, _example: Tensor) -> list[Any]:
    def first(images: Tensor) -> dict[str, Any]:
        hidden, (height, width) = model.patch_embed(images)
        positions = model.pos_embed(len(images), height, width).flatten(2).transpose(1, 2)
        return layer(0, hidden + positions, height, width)

    def layer(index: int, hidden: Tensor, height: int, width: int) -> dict[str, Any]:
        return {"hidden": model.blocks[index](hidden, height, width), "height": height, "width": width}

    def last(hidden: Tensor, height: int, width: int) -> Any:
        return model.forward_head(model.norm(model.forward_cls(hidden)))

    others = range(1, len(model.blocks))
    return [
        CallableBlock(first, modules=[model.patch_embed, model.pos_embed, model.blocks[0]]),
        *(CallableBlock(partial(layer, index), modules=[model.blocks[index]]) for index in others),
        CallableBlock(
            last, modules=[model.cls_attn_blocks, model.norm, model.head, nn.ParameterList([model.cls_token])]
        ),
    ]


def _twins_blocks(model: Any, _example: Tensor) -> list[Any]:
    def stage(index: int, images: Tensor) -> Any:
        tokens, size = model.patch_embeds[index](images)
        tokens = model.pos_drops[index](tokens)
        for number, layer in enumerate(model.blocks[index]):
            tokens = layer(tokens, size)
            if number == 0:
                tokens = model.pos_block[index](tokens, size)
        if index + 1 == len(model.blocks):
            return tokens
        return tokens.reshape(len(tokens), *size, -1).permute(0, 3, 1, 2).contiguous()

    parts = zip(model.patch_embeds, model.pos_drops, model.blocks, model.pos_block, strict=True)
    stages = [CallableBlock(partial(stage, index), modules=list(modules)) for index, modules in enumerate(parts)]
    return [*stages, _tail(model, "norm", "head")]


_CALLED = "`head` itself is never called"
_DISTILLED = "two heads"

ENTRIES = {
    # Convolutions.
    "convnext_atto": _staged("convnext_atto", further=["joint", "compile"]),
    "resnetv2_18": _staged("resnetv2_18", is_trained=False),
    "res2net50_14w_8s": _staged("res2net50_14w_8s", "layer1", "layer2", "layer3", "layer4", "fc", is_trained=False),
    "resnest14d": _staged("resnest14d", "layer1", "layer2", "layer3", "layer4", "fc"),
    "skresnet18": _staged("skresnet18", "layer1", "layer2", "layer3", "layer4", "fc", is_trained=False),
    "gernet_s": _staged("gernet_s", is_trained=False),
    "repvgg_a0": _staged("repvgg_a0"),
    "mobileone_s0": _staged("mobileone_s0"),
    "mobilenetv4_conv_small_035": _staged(
        "mobilenetv4_conv_small_035", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "classifier"
    ),
    "ghostnet_050": _staged("ghostnet_050", "blocks.2", "blocks.4", "blocks.6", "blocks.8", "classifier"),
    "ghostnetv3_050": _staged(
        "ghostnetv3_050", "blocks.2", "blocks.4", "blocks.6", "blocks.8", "classifier", is_trained=False
    ),
    "tinynet_e": _staged("tinynet_e", "blocks.1", "blocks.3", "blocks.5", "blocks", "classifier"),
    "rexnet_100": _staged(
        "rexnet_100", "features.3", "features.7", "features.11", "features", "head", is_trained=False
    ),
    "starnet_s050": _staged("starnet_s050"),
    "cspnext_tiny": _staged("cspnext_tiny"),
    "vovnet39a": _staged("vovnet39a", is_trained=False),
    "dla34": _staged("dla34", "level1", "level2", "level3", "level4", "level5", "fc", is_trained=False),
    "hrnet_w18_small": _staged(
        "hrnet_w18_small",
        "layer1",
        "stage2",
        "stage3",
        "stage4",
        "classifier",
        remark="boundaries of 2 to 4 tensors",
    ),
    "selecsls42": _staged("selecsls42", "features.1", "features.3", "features.5", "fc", remark="boundaries are lists"),
    "eca_nfnet_l0": _staged("eca_nfnet_l0", remark="standardised weights", is_trained=False),
    "rdnet_tiny": _staged(
        "rdnet_tiny", "dense_stages.0", "dense_stages.2", "dense_stages.4", "dense_stages", "head", is_trained=False
    ),
    "inception_next_atto": _staged("inception_next_atto"),
    "mambaout_femto": _staged("mambaout_femto"),
    "xception41": _staged("xception41", "blocks.2", "blocks.5", "blocks.11", "head", size=96, is_trained=False),
    # Convolutions with attention.
    "fastvit_t8": _staged("fastvit_t8"),
    "repvit_m0_9": _staged("repvit_m0_9"),
    "mobilevit_xxs": _staged("mobilevit_xxs", *_STAGES[:4], "stages.4", "head"),
    "mobilevitv2_050": _staged("mobilevitv2_050", *_STAGES[:4], "stages.4", "head"),
    "edgenext_xx_small": _staged("edgenext_xx_small"),
    "efficientvit_b0": _staged("efficientvit_b0"),
    "efficientvit_m0": _sized("efficientvit_m0", "stages.0", "stages.1", "stages.2", "head"),
    "shvit_s1": _staged(
        "shvit_s1", "patch_embed", "stages.0", "stages.1", "stages.2", "head", size=128, is_trained=False
    ),
    "coatnet_nano_rw_224": _sized("coatnet_nano_rw_224", is_trained=False),
    "halonet26t": _staged("halonet26t", size=256, is_trained=False),
    "nextvit_small": _staged("nextvit_small", is_trained=False),
    "efficientformer_l1": _staged("efficientformer_l1", *_STAGES[:4], "", size=224, remark=_DISTILLED),
    "efficientformerv2_s0": _sized("efficientformerv2_s0", *_STAGES[:4], "", remark=_DISTILLED),
    "swiftformer_xs": _staged("swiftformer_xs", *_STAGES[:4], "", remark=_DISTILLED, is_trained=False),
    "levit_128s": _sized("levit_128s", "stem", "stages.0", "stages.1", "stages.2", "", remark=_DISTILLED),
    "visformer_tiny": _sized("visformer_tiny", "stage1", "stage2", "stage3", "head", is_trained=False),
    "poolformer_s12": Entry(
        teacher=_timm("poolformer_s12"),
        paths=(*_STAGES[:4], "head.fc"),
        first_try=_STAGES,
        refusal=("`head` of the student must be called", "`head.fc`"),
        remark=_CALLED,
    ),
    # Attention.
    "vit_tiny_patch16_224": _sized(
        "vit_tiny_patch16_224", *_layers(4, "head"), depth=4, further=["joint"], remark="4 layers"
    ),
    "deit_tiny_distilled_patch16_224": _sized(
        "deit_tiny_distilled_patch16_224", *_layers(4, ""), depth=4, remark=f"4 layers, {_DISTILLED}"
    ),
    "beit_base_patch16_224": _sized(
        "beit_base_patch16_224", *_layers(4, "head"), depth=4, embed_dim=96, num_heads=4, remark="4 narrow layers"
    ),
    "eva02_tiny_patch14_224": _sized(
        "eva02_tiny_patch14_224",
        *_layers(4, "head"),
        size=56,
        depth=4,
        remark="4 layers that read one table of positions",
    ),
    "naflexvit_base_patch16_gap": Entry(
        teacher=_timm("naflexvit_base_patch16_gap", depth=4, embed_dim=96, num_heads=4),
        paths=_layers(4, "head"),
        remark="4 narrow layers",
    ),
    "cait_xxs24_224": Entry(
        teacher=_timm("cait_xxs24_224", img_size=64, depth=8),
        paths=("blocks.3", "blocks.5", "blocks", "head"),
        first_try=("blocks.3", "blocks", "blocks_token_only.1", "head"),
        refusal=("used by `cat`", "Leave out `blocks_token_only.1`"),
        remark="8 layers; the class tokens' layers see the last of them",
    ),
    "xcit_nano_12_p16_224": Entry(
        teacher=_timm("xcit_nano_12_p16_224", img_size=64, depth=4),
        list_blocks=_xcit_blocks,
        way="list of functions",
        first_try=("blocks.0", "blocks.1", "head"),
        refusal=("`patch_embed`", "pass the blocks yourself"),
        remark="4 layers, each of which is told the size of the image",
    ),
    "test_vit": Entry(
        teacher=_timm("test_vit"),
        list_blocks=_vit_blocks,
        way="`layer_blocks`",
        first_try=("blocks.0", "blocks.1", "head"),
        refusal=("a value decides what is done", "Pass the blocks yourself"),
        remark="a ViT for images of any size (`dynamic_img_size`)",
    ),
    "twins_svt_small": Entry(
        teacher=_timm("twins_svt_small", img_size=64),
        list_blocks=_twins_blocks,
        way="list of functions",
        first_try=("blocks.0", "blocks.1", "head"),
        refusal=("a value decides what is done", "Pass the blocks yourself"),
        remark="sizes are unpacked between stages",
    ),
    "swin_tiny_patch4_window7_224": _sized(
        "swin_tiny_patch4_window7_224",
        *(f"layers.{index}" for index in range(4)),
        "head",
        window_size=2,
        embed_dim=24,
        num_heads=(1, 2, 4, 8),
        remark="a quarter of its width",
    ),
    "swinv2_cr_tiny_224": _sized(
        "swinv2_cr_tiny_224", embed_dim=24, num_heads=(1, 2, 4, 8), remark="a quarter of its width"
    ),
    "pvt_v2_b0": _staged("pvt_v2_b0"),
    "davit_tiny": _staged("davit_tiny", is_trained=False),
    "focalnet_tiny_srf": _staged(
        "focalnet_tiny_srf", *(f"layers.{index}" for index in range(4)), "head", is_trained=False
    ),
    "nest_tiny": _sized("nest_tiny", "levels.0", "levels.1", "levels.2", "head", is_trained=False),
    "hiera_tiny_224": _sized("hiera_tiny_224", *_layers(12, "head"), embed_dim=24, remark="a quarter of its width"),
    "mvitv2_tiny": _sized("mvitv2_tiny", remark="boundaries of a tensor and the size of the image"),
    "gcvit_xxtiny": _staged("gcvit_xxtiny", size=224, is_trained=False),
    "tnt_s_patch16_224": _sized(
        "tnt_s_patch16_224", *_layers(4, "head"), depth=4, remark="boundaries of 2 tensors", is_trained=False
    ),
    "pit_ti_distilled_224": _sized(
        "pit_ti_distilled_224",
        "transformers.0",
        "transformers.1",
        "transformers.2",
        "",
        remark="boundaries of 2 tensors",
    ),
    "sequencer2d_s": _sized("sequencer2d_s", remark="LSTMs", is_trained=False),
    "volo_d1_224": _sized(
        "volo_d1_224", "network.0", "network.2", "network.3", "network.4", "", remark=_DISTILLED, is_trained=False
    ),
    # Perceptrons.
    "mixer_s32_224": _sized("mixer_s32_224", *_layers(8, "head")),
    "resmlp_12_224": _sized("resmlp_12_224", *_layers(12, "head")),
}
