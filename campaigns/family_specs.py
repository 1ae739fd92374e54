"""Tiny configurations of the model types that AutoModel opens for images, and what transformers says of their hidden states.

What a reader of each class in transformers finds stands here by hand, so that it can be compared with what the package finds:
whether a state is tokens or a map, on which axis the channels are, and how many tokens stand before and behind the patches.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Form:
    """Where the patches are in a hidden state."""

    axes: str  # "tokens" (n, tokens, d), "map" (n, d, h, w) or "map, channels last" (n, h, w, d)
    prefix: int = 0  # class, distillation and register tokens before the patches
    suffix: int = 0  # tokens behind them


POOLINGS = ("mean", "patch_mean", "cls", "last_mean", "last_patch_mean", "last_cls")
TOKENS, MAP, LAST_CHANNELS = Form("tokens"), Form("map"), Form("map, channels last")
CLASS = Form("tokens", 1)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A tiny model of one type."""

    config: dict[str, Any]
    size: int = 32
    state: Form | None = TOKENS  # of hidden_states[-1]; None: the model gives none
    last: Form | None = None  # of last_hidden_state, where it differs
    has_last: bool = True  # whether the model gives a last_hidden_state
    body: str = ""  # name of the images' part in the whole model, where its class is not AutoModel's
    by_hand: dict[str, Any] = field(default_factory=dict)  # of its config: without it the type masks random patches
    processor: dict[str, Any] | str = ""  # settings on the hub, or the class of another type, if its own needs torchvision

    @property
    def last_form(self) -> Form | None:
        return (self.last or self.state) if self.has_last else None


W = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "intermediate_size": 64,
}  # fmt: skip
TEXT = {
    "vocab_size": 50, "max_position_embeddings": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 64,
}  # fmt: skip
LANGUAGE = TEXT | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
FOUR = {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 32, 48], "num_attention_heads": [1, 1, 2, 2]}
SWIN = {"image_size": 32, "depths": [1, 2], "patch_size": 4, "embed_dim": 16, "num_heads": [2, 2], "window_size": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 32, 32, 48], "depths": [1, 1, 1, 1]}
SAM = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
    "output_channels": 24, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64,
}  # fmt: skip
SAM3 = W | {"image_size": 64, "pretrain_image_size": 32, "window_size": 4, "global_attn_indexes": [1]}
DETECTOR = {
    "backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}, "d_model": 32,
    "use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5,
}  # fmt: skip
DINOV3 = {
    "do_rescale": True, "do_resize": True, "do_normalize": True, "size": {"height": 224, "width": 224}, "resample": 2,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "rescale_factor": 1 / 255,
    "image_processor_type": "DINOv3ViTImageProcessorFast", "data_format": "channels_first",
}  # fmt: skip


def dual(vision: dict[str, Any] = W, **others: Any) -> dict[str, Any]:
    """A model of images and texts."""
    return {"vision_config": vision, "text_config": TEXT, "projection_dim": 16} | others


# The types with a class for image classification, in the order of transformers.
CLASSIFIED = {
    "beit": Spec(config=W | {"use_relative_position_bias": True}, state=CLASS),
    "bit": Spec(config=RESNET | {"num_groups": 4, "layer_type": "bottleneck"}, size=64, state=MAP),
    "clip": Spec(config=dual(), state=CLASS),
    "convnext": Spec(config=RESNET | {"image_size": 64, "layer_scale_init_value": 0.5}, size=64, state=MAP),
    "convnextv2": Spec(config=RESNET | {"image_size": 64}, size=64, state=MAP),
    "cvt": Spec(config={"embed_dim": [8, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, size=64, state=MAP),
    "data2vec-vision": Spec(config=W | {"use_relative_position_bias": True}, state=CLASS),
    "deit": Spec(config=W, state=Form("tokens", 2)),
    "dinat": Spec(
        config={
            "patch_size": 4, "embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "kernel_size": 3,
            "dilations": [[1], [1, 2]],
        },
        size=64, state=LAST_CHANNELS,
    ),
    "dinov2": Spec(config=W, state=CLASS),
    "dinov2_with_registers": Spec(
        config=W | {"num_register_tokens": 4}, state=Form("tokens", 5), processor="BitImageProcessorPil"
    ),
    "donut-swin": Spec(config=SWIN),
    "efficientnet": Spec(config={"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}, size=64, state=MAP),
    "focalnet": Spec(
        config={
            "image_size": 32, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "patch_size": 4,
            "focal_levels": [1, 1], "focal_windows": [3, 3],
        }
    ),
    "hgnet_v2": Spec(
        config={
            "embedding_size": 8, "hidden_sizes": [16, 32, 32, 64], "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 16, 32, 32], "stage_mid_channels": [8, 8, 8, 8], "stage_out_channels": [16, 32, 32, 64],
            "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
        },
        size=64, state=MAP, has_last=False,
    ),
    "hiera": Spec(
        config={
            "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "mlp_ratio": 2.0,
            "patch_stride": [4, 4], "patch_size": [7, 7], "patch_padding": [3, 3],
        },
        size=64,
    ),
    "ijepa": Spec(config=W),
    "imagegpt": Spec(config={"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 64}),
    "levit": Spec(
        config={
            "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        size=64,
    ),
    "metaclip_2": Spec(config=dual(), state=CLASS, body="vision_model"),
    "mobilenet_v1": Spec(config={"tf_padding": False, "depth_multiplier": 0.25}, size=64, state=MAP),
    "mobilenet_v2": Spec(
        config={"tf_padding": False, "depth_multiplier": 0.35, "finegrained_output": True}, size=64, state=MAP
    ),
    "mobilevit": Spec(
        config={"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48]},
        size=64, state=MAP,
    ),
    "mobilevitv2": Spec(config={"image_size": 64, "width_multiplier": 0.25}, size=64, state=MAP),
    "perceiver": Spec(
        config={
            "num_latents": 8, "d_latents": 32, "d_model": 64, "num_blocks": 1, "num_self_attends_per_block": 2,
            "num_self_attention_heads": 2, "num_cross_attention_heads": 1, "image_size": 32,
        }
    ),
    "poolformer": Spec(config={"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}, size=64, state=MAP),
    "pp_lcnet": Spec(
        config={"scale": 0.25}, size=64, state=MAP, has_last=False, body="encoder",
        processor={
            "image_processor_type": "PPLCNetImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
            "do_normalize": True, "resize_short": 256, "size_divisor": 1, "crop_size": 224, "resample": 2,
            "image_mean": [0.406, 0.456, 0.485], "image_std": [0.225, 0.224, 0.229], "rescale_factor": 1 / 255,
        },
    ),
    "pvt": Spec(config=FOUR, size=64, state=CLASS),
    "pvt_v2": Spec(config=FOUR, size=64, state=MAP),
    "regnet": Spec(config=RESNET | {"groups_width": 8}, size=64, state=MAP),
    "resnet": Spec(config=RESNET, size=64, state=MAP),
    "segformer": Spec(config=FOUR | {"decoder_hidden_size": 16}, size=64, state=MAP),
    "shieldgemma2": Spec(config={"vision_config": W, "text_config": LANGUAGE, "mm_tokens_per_image": 4}),
    "siglip": Spec(config=dual()),
    "siglip2": Spec(config=dual({key: value for key, value in W.items() if key != "image_size"} | {"num_patches": 16})),
    "swiftformer": Spec(config={"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [8, 16, 24, 32]}, size=64, state=MAP),
    "swin": Spec(config=SWIN),
    "swinv2": Spec(config=SWIN),
    "textnet": Spec(
        config={
            "image_size": [64, 64], "stem_out_channels": 8, "hidden_sizes": [8, 8, 16, 16, 32], "depths": [1, 1, 1, 1],
            "conv_layer_kernel_sizes": [[[3, 3]], [[1, 3]], [[3, 1]], [[3, 3]]], "conv_layer_strides": [[1], [2], [2], [2]],
        },
        size=64, state=MAP,
    ),
    "timm_wrapper": Spec(
        config={"architecture": "resnet18.a1_in1k", "model_args": {"channels": [8, 8, 16, 16]}}, size=64, state=MAP
    ),
    "vit": Spec(config=W, state=CLASS),
    "vit_msn": Spec(config=W, state=CLASS),
}  # fmt: skip
# Further types that AutoModel opens, and which take pixels alone.
OTHERS = {
    "aimv2_vision_model": Spec(config=W),
    "chinese_clip_vision_model": Spec(config=W, state=CLASS),
    "clip_vision_model": Spec(config=W, state=CLASS, processor="CLIPImageProcessorPil"),
    "conditional_detr": Spec(config=DETECTOR, size=64, state=None, last=TOKENS),
    "dab-detr": Spec(config=DETECTOR | {"hidden_size": 32}, size=64, state=None, last=TOKENS),
    "deformable_detr": Spec(config=DETECTOR | {"num_feature_levels": 3}, size=64, state=None, last=TOKENS),
    "detr": Spec(config=DETECTOR, size=64, state=None, last=TOKENS),
    "dinov3_convnext": Spec(
        config={"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "image_size": 64}, size=64, state=MAP, last=CLASS,
        processor=DINOV3,
    ),
    "dinov3_vit": Spec(config=W | {"num_register_tokens": 4}, state=Form("tokens", 5), processor=DINOV3),
    "dpt": Spec(
        config=W | {"is_hybrid": False, "backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8]}, state=CLASS
    ),
    "glpn": Spec(config=FOUR, size=64, state=MAP),
    "granite_docling_vision": Spec(config=W | {"deepstack_visual_indexes": [0, 1]}),
    "idefics3_vision": Spec(config=W),
    "internvl_vision": Spec(config=W, state=CLASS),
    "maskformer-swin": Spec(config=SWIN, state=None, last=TOKENS),
    "mgp-str": Spec(
        config=W | {"image_size": [32, 32], "max_token_length": 5, "num_bpe_labels": 30, "num_wordpiece_labels": 30},
        state=CLASS, has_last=False,
    ),
    "mlcd_vision_model": Spec(config=W, state=CLASS),
    "pixio": Spec(config=W | {"decoder_hidden_size": 16}, state=Form("tokens", 8)),
    "pixtral": Spec(config=W),
    "qianfan_ocr_vision": Spec(config=W | {"image_size": [32, 32], "patch_size": [8, 8]}, state=CLASS),
    "radio": Spec(config=W, state=Form("tokens", 10)),
    "sam3_vit_model": Spec(config=SAM3, size=64, state=LAST_CHANNELS, last=TOKENS),
    "sam3_vision_model": Spec(
        config={
            "backbone_config": SAM3 | {"model_type": "sam3_vit_model"}, "fpn_hidden_size": 16,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        size=64, state=LAST_CHANNELS, last=TOKENS,
    ),
    "sam_hq_vision_model": Spec(config=SAM, size=64, state=LAST_CHANNELS, last=MAP),
    "sam_vision_model": Spec(config=SAM, size=64, state=LAST_CHANNELS, last=MAP, processor="SamImageProcessorPil"),
    "sapiens2": Spec(
        config=W | {"num_key_value_heads_per_layer": [2, 2], "num_key_value_attention_heads": 1, "num_register_tokens": 4},
        state=Form("tokens", 5),
    ),
    "siglip_vision_model": Spec(config=W, processor="SiglipImageProcessorPil"),
    "smolvlm_vision": Spec(config=W),
    "swin2sr": Spec(config=SWIN | {"patch_size": 1, "embed_dim": 12, "depths": [1, 1]}, last=MAP),
    "table-transformer": Spec(config=DETECTOR, size=64, state=None, last=TOKENS),
    "timesformer": Spec(config=W | {"num_frames": 2}, state=CLASS),
    "tipsv2_vision_model": Spec(config=W | {"mlp_ratio": 2}, state=Form("tokens", 2)),
    "videomae": Spec(config=W | {"num_frames": 4}),
    "vit_mae": Spec(
        config=W | {
            "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        state=CLASS, by_hand={"mask_ratio": 0.0},
    ),
    "vitdet": Spec(config=W, state=MAP),
    "yolos": Spec(config=W | {"image_size": [32, 32], "num_detection_tokens": 5}, state=Form("tokens", 1, 5)),
}  # fmt: skip
# Whole models whose part for images is a base: saved by transformers as a whole, with an adapter of that part.
WRAPPERS = {
    "aimv2": Spec(config=dual()),
    "chinese_clip": Spec(config=dual(), state=CLASS),
    "idefics3": Spec(config={"vision_config": W, "text_config": LANGUAGE | {"model_type": "llama"}, "scale_factor": 2}),
    "internvl": Spec(
        config={"vision_config": W, "text_config": LANGUAGE | {"model_type": "llama"}, "image_seq_length": 4}, state=CLASS
    ),
    "llava": Spec(
        config={
            "vision_config": W | {"model_type": "clip_vision_model"}, "text_config": LANGUAGE | {"model_type": "llama"}
        },
        state=CLASS,
    ),
    "paligemma": Spec(
        config={
            "vision_config": W | {"model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False},
            "text_config": LANGUAGE | {"model_type": "gemma"}, "projection_dim": 32,
        }
    ),
    "sam": Spec(config={"vision_config": SAM}, size=64, state=LAST_CHANNELS, last=MAP, body="vision_encoder"),
    "vision-text-dual-encoder": Spec(
        config={"vision_config": W | {"model_type": "vit"}, "text_config": TEXT | {"model_type": "bert"}, "projection_dim": 16},
        state=CLASS,
    ),
}  # fmt: skip
SPECS = CLASSIFIED | OTHERS | WRAPPERS
