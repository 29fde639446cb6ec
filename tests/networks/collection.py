"""Networks of other people's packages, unmodified, in sizes that run in seconds.

Each entry builds u(z, r, t) in as few words as a user would need, and says the shape of a sample z. Where a network
takes one time, it gets t; where it takes tokens, z is tokens. `quick` ones belong to every test run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmf_fast import Adapter
from networks import stubs

IMAGE = (3, 8, 8)
LATENT = (4, 8, 8)
TOKENS = (6, 16)


@dataclass
class Entry:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    quick: bool = False
    compiles: bool = True  # as a plain network, whole
    float32_parts: bool = False  # it computes some values in float32, such as an embedding of the time


NETWORKS: dict[str, Entry] = {}


def entry(
    name: str,
    shape: tuple[int, ...] = IMAGE,
    *,
    quick: bool = False,
    compiles: bool = True,
    float32_parts: bool = False,
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        NETWORKS[name] = Entry(build, shape, quick, compiles, float32_parts)
        return build

    return add


def fixed(*shape: int) -> torch.Tensor:
    """Conditions (text, labels): the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class Conditioned(nn.Module):
    """A network with conditions as buffers, which follow its dtype, repeated for each sample."""

    def __init__(self, net: nn.Module, call: Callable[..., Any], **conditions: torch.Tensor) -> None:
        super().__init__()
        self.net, self.call, self.names = net, call, list(conditions)
        for name, value in conditions.items():
            self.register_buffer(name, value)

    def forward(self, z: Any, r: Any, t: Any) -> Any:
        return self.call(
            self.net,
            z,
            r,
            t,
            **{n: getattr(self, n).repeat_interleave(len(r), 0) for n in self.names},
        )


# -- diffusers ---------------------------------------------------------------------------------------------------------


@entry("diffusers UNet2DModel")
def unet2d() -> nn.Module:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=8,
        dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return Adapter(net, lambda net, z, r, t: net(z, 100 * t).sample)


@entry(
    "diffusers UNet2DModel fir scale_shift",
)
def unet2d_fir() -> nn.Module:
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        norm_num_groups=32,
        layers_per_block=1,
        attention_head_dim=8,
        time_embedding_type="fourier",
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    )
    return Adapter(net, lambda net, z, r, t: net(z, t + 0.5).sample)


@entry("diffusers UNet2DConditionModel", LATENT)
def unet2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, 100 * t, text).sample, text=fixed(1, 5, 16))


@entry("diffusers UNet3DConditionModel", (4, 2, 8, 8))
def unet3d() -> nn.Module:
    from diffusers import UNet3DConditionModel

    net = UNet3DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, 100 * t, text).sample, text=fixed(1, 5, 16))


@entry("diffusers DiTTransformer2DModel", LATENT, quick=True)
def dit() -> nn.Module:
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        norm_num_groups=4,
        dropout=0.1,
    )
    return Adapter(net, lambda net, z, r, t: net(z, 100 * t, class_labels=torch.zeros(len(r), dtype=torch.long)).sample)


@entry("diffusers PixArtTransformer2DModel", LATENT)
def pixart() -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=16,
        caption_channels=12,
        norm_num_groups=4,
    )
    return Conditioned(
        net,
        lambda net, z, r, t, text: (
            net(
                z,
                encoder_hidden_states=text,
                timestep=100 * t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        ),
        text=fixed(1, 5, 12),
    )


@entry("diffusers SD3Transformer2DModel", LATENT)
def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    return Conditioned(
        net,
        lambda net, z, r, t, text, pooled: net(z, text, pooled, 100 * t).sample,
        text=fixed(1, 5, 12),
        pooled=fixed(1, 10),
    )


@entry("diffusers FluxTransformer2DModel", (16, 8))
def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=False,
    )
    ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1)
    return Conditioned(
        net,
        lambda net, z, r, t, text, pooled: net(z, text, pooled, t, img_ids=ids, txt_ids=torch.zeros(5, 3)).sample,
        text=fixed(1, 5, 12),
        pooled=fixed(1, 10),
    )


@entry("diffusers Lumina2Transformer2DModel", LATENT, compiles=False)  # it branches on the values of a mask
def lumina2() -> nn.Module:
    from diffusers import Lumina2Transformer2DModel

    net = Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(16, 16, 16),
        cap_feat_dim=8,
    )
    return Conditioned(
        net,
        lambda net, z, r, t, text: net(z, t, text, torch.ones(len(r), 5, dtype=torch.bool)).sample,
        text=fixed(1, 5, 8),
    )


@entry("diffusers WanTransformer3DModel", (4, 2, 4, 4), float32_parts=True)
def wan() -> nn.Module:
    from diffusers import WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, 100 * t, text).sample, text=fixed(1, 5, 8))


@entry("diffusers QwenImageTransformer2DModel", (16, 8))
def qwen() -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    net = QwenImageTransformer2DModel(
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 6, 6),
    )
    return Conditioned(
        net,
        lambda net, z, r, t, text: (
            net(z, text, torch.ones(len(r), 5, dtype=torch.bool), t, img_shapes=[[(1, 4, 4)]] * len(r)).sample
        ),
        text=fixed(1, 5, 12),
    )


@entry("diffusers SanaTransformer2DModel", LATENT)
def sana() -> nn.Module:
    from diffusers import SanaTransformer2DModel

    net = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=8,
        sample_size=8,
        patch_size=1,
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, text, 100 * t).sample, text=fixed(1, 5, 8))


@entry("diffusers AuraFlowTransformer2DModel", LATENT, float32_parts=True)
def auraflow() -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    net = AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=64,
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, text, t).sample, text=fixed(1, 5, 12))


@entry("diffusers HunyuanDiT2DModel", LATENT, float32_parts=True)
def hunyuan() -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    net = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=10,
        text_len=3,
        text_len_t5=4,
        learn_sigma=False,
        use_style_cond_and_image_meta_size=False,
    )
    rope = (torch.cos(torch.arange(128.0).view(16, 8)), torch.sin(torch.arange(128.0).view(16, 8)))
    return Conditioned(
        net,
        lambda net, z, r, t, text, more: (
            net(z, 100 * t, text, torch.ones(len(r), 3), more, torch.ones(len(r), 4), image_rotary_emb=rope).sample
        ),
        text=fixed(1, 3, 12),
        more=fixed(1, 4, 16),
    )


@entry("diffusers CogVideoXTransformer3DModel", (2, 4, 8, 8))
def cogvideox() -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    net = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
        dropout=0.1,
    )
    return Conditioned(net, lambda net, z, r, t, text: net(z, text, 100 * t).sample, text=fixed(1, 5, 8))


@entry("diffusers Transformer2DModel", LATENT, compiles=False)  # it warns that a class is deprecated
def transformer2d() -> nn.Module:
    from diffusers import Transformer2DModel

    net = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, norm_num_groups=2, dropout=0.1
    )
    return Adapter(net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None, None]).sample)


# -- denoising-diffusion-pytorch ---------------------------------------------------------------------------------------


@entry("denoising-diffusion Unet", (3, 16, 16))
def ddp_unet() -> nn.Module:
    with stubs.installed():
        from denoising_diffusion_pytorch import Unet

    return Adapter(
        Unet(dim=8, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, dropout=0.1), lambda net, z, r, t: net(z, 10 * t)
    )


@entry("denoising-diffusion Unet1D", (3, 16))
def ddp_unet1d() -> nn.Module:
    with stubs.installed():
        from denoising_diffusion_pytorch import Unet1D

    return Adapter(
        Unet1D(dim=8, dim_mults=(1, 2), channels=3, attn_dim_head=8, attn_heads=2), lambda net, z, r, t: net(z, 10 * t)
    )


@entry("denoising-diffusion KarrasUnet", (4, 8, 8))
def karras() -> nn.Module:
    with stubs.installed():
        from denoising_diffusion_pytorch import KarrasUnet

    net = KarrasUnet(
        image_size=8,
        dim=8,
        dim_max=16,
        channels=4,
        num_downsamples=1,
        num_blocks_per_stage=1,
        attn_res=(4,),
        fourier_dim=8,
        attn_dim_head=8,
        dropout=0.1,
    )
    return Adapter(net, lambda net, z, r, t: net(z, t))


@entry("denoising-diffusion UViT", (3, 16, 16))
def uvit() -> nn.Module:
    with stubs.installed():
        from denoising_diffusion_pytorch.simple_diffusion import UViT

    net = UViT(
        dim=16,
        dim_mults=(1, 2),
        vit_depth=1,
        attn_dim_head=8,
        attn_heads=2,
        channels=3,
        vit_dropout=0.1,
        ff_mult=1,
        patch_size=1,
    )
    return Adapter(net, lambda net, z, r, t: net(z, t))


# -- x-transformers, transformers, PyTorch's own -----------------------------------------------------------------------


def with_time(net: nn.Module) -> nn.Module:
    """A network of tokens without a time: t scales its input."""
    return Adapter(net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None]))


@entry("x-transformers Encoder rotary", TOKENS, quick=True)
def x_rotary() -> nn.Module:
    with stubs.installed():
        from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(
        dim=16,
        depth=1,
        heads=2,
        attn_dim_head=8,
        rotary_pos_emb=True,
        layer_dropout=0.0,
        attn_dropout=0.1,
        ff_dropout=0.1,
    )
    return with_time(ContinuousTransformerWrapper(dim_in=16, dim_out=16, max_seq_len=8, attn_layers=layers))


@entry("x-transformers Encoder flash rmsnorm glu", TOKENS)
def x_flash() -> nn.Module:
    with stubs.installed():
        from x_transformers import ContinuousTransformerWrapper, Encoder

    layers = Encoder(
        dim=16,
        depth=2,
        heads=2,
        attn_dim_head=8,
        attn_flash=True,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        attn_qk_norm=True,
    )
    return with_time(ContinuousTransformerWrapper(dim_in=16, dim_out=16, max_seq_len=8, attn_layers=layers))


@entry("x-transformers Encoder, adaptive norms", TOKENS)
def x_adaptive() -> nn.Module:
    with stubs.installed():
        from x_transformers import Encoder

    net = Encoder(
        dim=16,
        depth=2,
        heads=2,
        attn_dim_head=8,
        dim_condition=8,
        use_adaptive_layernorm=True,
        use_adaptive_layerscale=True,
    )
    return Adapter(
        net, lambda net, z, r, t: net(z, condition=torch.cos(t)[:, None] * torch.linspace(0, 1, 8, dtype=t.dtype))
    )


@entry("torch TransformerEncoderLayer", TOKENS)
def encoder_layer() -> nn.Module:
    return with_time(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True, activation="gelu"), 2
        )
    )


@entry("transformers LlamaModel", TOKENS)
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,
    )
    return Adapter(
        LlamaModel(config), lambda net, z, r, t: net(inputs_embeds=z * torch.cos(t)[:, None, None]).last_hidden_state
    )


@entry("transformers ViTModel", (3, 8, 8), quick=True)
def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=12,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=2,
        hidden_dropout_prob=0.1,
    )
    net = ViTModel(config, add_pooling_layer=False)
    return Adapter(
        net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None, None]).last_hidden_state[:, 1:].reshape(z.shape)
    )


# -- k-diffusion, torchcfm ---------------------------------------------------------------------------------------------


@entry("k-diffusion ImageDenoiserModelV1")
def k_image() -> nn.Module:
    with stubs.installed():
        from k_diffusion.layers import SelfAttention2d
        from k_diffusion.models import ImageDenoiserModelV1

    net = ImageDenoiserModelV1(3, 16, (1, 1), (16, 16), (False, True), dropout_rate=0.1)
    for module in net.modules():
        if isinstance(module, SelfAttention2d):  # it drops in evaluation mode, too
            module.dropout.p = 0.0
    return Adapter(net, lambda net, z, r, t: net(z, t + 0.5))


@entry("k-diffusion ImageTransformerDenoiserModelV1", compiles=False)  # it tries to import flash_attn in its forward
def k_transformer() -> nn.Module:
    with stubs.installed():
        from k_diffusion.models import ImageTransformerDenoiserModelV1

    net = ImageTransformerDenoiserModelV1(2, 64, 128, 3, 3, (2, 2), dropout=0.1)
    return Adapter(net, lambda net, z, r, t: net(z, t + 0.5))


@entry("torchcfm MLP", (5,), quick=True)
def cfm_mlp() -> nn.Module:
    with stubs.installed():
        from torchcfm.models.models import MLP

    return Adapter(MLP(dim=5, w=16, time_varying=True), lambda net, z, r, t: net(torch.cat((z, t[:, None]), 1)))


# -- timm --------------------------------------------------------------------------------------------------------------


@entry("timm vision transformer block", TOKENS)
def timm_block() -> nn.Module:
    with stubs.installed():
        from timm.models.vision_transformer import Block

    return with_time(
        nn.Sequential(
            Block(16, 2, qkv_bias=True, qk_norm=True, init_values=0.1, drop_path=0.0, proj_drop=0.1, attn_drop=0.1),
            Block(16, 2),
        )
    )


@entry("timm ConvNeXt block", (8, 8, 8))
def timm_convnext() -> nn.Module:
    with stubs.installed():
        from timm.models.convnext import ConvNeXtBlock

    net = nn.Sequential(ConvNeXtBlock(8, drop_path=0.1), ConvNeXtBlock(8, use_grn=True))
    return Adapter(net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None, None]))


@entry("timm squeeze-excite, CBAM, ECA", (8, 8, 8))
def timm_attention() -> nn.Module:
    with stubs.installed():
        from timm.layers import EcaModule, SEModule
        from timm.layers.cbam import CbamModule

    net = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), SEModule(8), CbamModule(8, rd_ratio=0.5), EcaModule(8), nn.Conv2d(8, 8, 1)
    )
    return Adapter(net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None, None]))


@entry("timm Swin transformer stage", (8, 8, 8))
def timm_swin() -> nn.Module:
    with stubs.installed():
        from timm.models.swin_transformer import SwinTransformerBlock

    net = nn.Sequential(
        *(
            SwinTransformerBlock(8, (8, 8), num_heads=2, window_size=4, shift_size=shift, proj_drop=0.1)
            for shift in (0, 2)
        )
    )
    return Adapter(
        net, lambda net, z, r, t: net((z * torch.cos(t)[:, None, None, None]).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    )


@entry("timm MLP-Mixer, GluMlp", TOKENS)
def timm_mixer() -> nn.Module:
    with stubs.installed():
        from timm.layers import GluMlp, SwiGLU
    with stubs.installed():
        from timm.models.mlp_mixer import MixerBlock

    return with_time(nn.Sequential(MixerBlock(16, 6), GluMlp(16, 32, 16), SwiGLU(16, 32, 16)))


# -- PEFT, parametrizations --------------------------------------------------------------------------------------------


@entry("PEFT LoRA of a diffusers DiT", LATENT, quick=True)
def peft_dit() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    net = dit().net
    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v"], lora_dropout=0.1, init_lora_weights=False
    )
    return Adapter(
        get_peft_model(net, config),
        lambda net, z, r, t: (
            net(hidden_states=z, timestep=100 * t, class_labels=torch.zeros(len(r), dtype=torch.long)).sample
        ),
    )


@entry("PEFT DoRA of a diffusers UNet2DModel", compiles=False)  # PEFT asks a class for the name of its module
def peft_unet() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, lora_alpha=4, target_modules=["to_q", "to_v", "conv1"], use_dora=True, init_lora_weights=False
    )
    return Adapter(get_peft_model(unet2d().net, config), lambda net, z, r, t: net(sample=z, timestep=100 * t).sample)


@entry("parametrized layers", (4, 8, 8))
def parametrized() -> nn.Module:
    from torch.nn.utils import parametrizations

    net = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(4, 8, 3, padding=1)),
        nn.SiLU(),
        parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.utils.weight_norm(nn.Conv2d(8, 4, 1)),
        nn.Dropout(0.1),
        parametrizations.orthogonal(nn.Linear(8, 8)),
    )
    return Adapter(net, lambda net, z, r, t: net(z * torch.cos(t)[:, None, None, None]))
