"Random models of a few thousand weights, saved in the published layouts, for tests."

import json
import torch
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet3DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from vader_nb.core import make_generator
from vader_nb.memory.lora import lora_parameters
from vader_nb.models.base import Condition, VideoModel
from vader_nb.models.modelscope import ModelScope

WORDS = 'a panda fox dog riding bike playing chess washing dishes with hat'.split()
SCHEDULE = dict(
    beta_schedule='scaled_linear',
    beta_start=0.00085,
    beta_end=0.012,
    steps_offset=1,
    clip_sample=False,
    set_alpha_to_one=False,
)


def tiny_tokenizer(length=12):
    "A CLIP tokenizer whose vocabulary is `WORDS`."
    words = ['<|startoftext|>', '<|endoftext|>', '<|unknown|>']
    merges = []
    for word in WORDS:
        piece = word[0] if len(word) > 1 else ''
        words += [c + end for c in word for end in ('', '</w>')]
        for i in range(1, len(word)):
            end = '</w>' if i == len(word) - 1 else ''
            merges.append((piece, word[i] + end))
            piece += word[i] + end
            words.append(piece)
    vocab = {w: i for i, w in enumerate(dict.fromkeys(words))}
    return CLIPTokenizer(
        vocab=vocab, merges=list(dict.fromkeys(merges)), unk_token='<|unknown|>', model_max_length=length
    )


def tiny_parts(seed=0, length=12):
    "The parts of a `TextToVideoSDPipeline` with random weights; its layers are those of the published one."
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(length)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        hidden_act='gelu',
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    unet = UNet3DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'),
        up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4,
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=32,
    )
    for net in (unet, vae):  # the last layer of each starts near zero: make it speak
        for n, p in net.named_parameters():
            if n.startswith(('conv_out', 'decoder.conv_out')):
                torch.nn.init.normal_(p, std=0.2)
            elif 'conv4' in n or 'proj_out' in n:
                torch.nn.init.normal_(p, std=0.05)
    return dict(
        vae=vae.eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**SCHEDULE),
    )


def tiny_pipeline(seed=0, length=12):
    "A tiny random pipeline, as diffusers opens it."
    return TextToVideoSDPipeline(**tiny_parts(seed, length))


def published_layout(folder, seed=0):
    """A tiny pipeline in `folder`, with the file names and key names of ali-vilab/text-to-video-ms-1.7b; returns the
    pipeline.
    """
    from safetensors.torch import load_file, save_file

    pipe = tiny_pipeline(seed)
    pipe.save_pretrained(folder, variant='fp16')
    old = {'.to_q.': '.query.', '.to_k.': '.key.', '.to_v.': '.value.', '.to_out.0.': '.proj_attn.'}

    def rename(file, f):
        save_file({f(k): v.half() for k, v in load_file(file).items()}, file, metadata={'format': 'pt'})

    def old_attention(k):
        for new, was in old.items():
            k = k.replace(new, was) if 'mid_block.attentions' in k else k
        return k

    rename(folder / 'unet/diffusion_pytorch_model.fp16.safetensors', lambda k: k)
    rename(folder / 'vae/diffusion_pytorch_model.fp16.safetensors', old_attention)
    rename(
        folder / 'text_encoder/model.fp16.safetensors',
        lambda k: k if k.startswith('text_model.') else f'text_model.{k}',
    )
    made = json.loads((folder / 'tokenizer/tokenizer.json').read_text())['model']
    (folder / 'tokenizer/vocab.json').write_text(json.dumps(made['vocab']))
    (folder / 'tokenizer/merges.txt').write_text(
        '#version: 0.2\n' + '\n'.join(m if isinstance(m, str) else ' '.join(m) for m in made['merges']) + '\n'
    )
    (folder / 'tokenizer/tokenizer.json').unlink()
    return pipe


class Tiny(VideoModel):
    "Random networks of ModelScope's classes without a text encoder."

    name = 'tiny'
    checkpoint_layers = ModelScope.checkpoint_layers

    def __init__(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            unet = UNet3DConditionModel(
                sample_size=8,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                cross_attention_dim=12,
                attention_head_dim=4,
                layers_per_block=1,
                down_block_types=('CrossAttnDownBlock3D', 'DownBlock3D'),
                up_block_types=('UpBlock3D', 'CrossAttnUpBlock3D'),
            )
            for p in unet.parameters():
                if p.abs().sum() == 0:
                    p.data.normal_(0, 0.1)  # the zero-initialised last convolutions would hide the temporal layers
            self.vae = (
                AutoencoderKL(
                    block_out_channels=(8, 8),
                    norm_num_groups=4,
                    sample_size=16,
                    latent_channels=4,
                    down_block_types=('DownEncoderBlock2D',) * 2,
                    up_block_types=('UpDecoderBlock2D',) * 2,
                )
                .eval()
                .requires_grad_(False)
            )
        super().__init__(unet.eval(), DDIMScheduler(clip_sample=False))
        self.vae_scale = 2

    def denoise(self, x, t, embeds):
        return self.denoiser(x, t, embeds).sample

    def to_pixels(self, z):
        return self.vae.decode(z).sample / 2 + 0.5


cond = Condition(torch.randn(2, 5, 12, generator=make_generator(1)), torch.randn(2, 5, 12, generator=make_generator(2)))


def pretend_training(model, seed=3):
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(0.2 * torch.randn(p.shape, generator=make_generator(seed)))


def gradient(model, x, frames=None):
    loss = model.decode(model.predict(x, 500, cond, 3.0), frames).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, lora_parameters(model))])
