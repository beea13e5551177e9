"LoRA: exactness on a tiny random ModelScope, files that plain peft reads, and files that are refused."

import json
import pytest, torch
from diffusers import TextToVideoSDPipeline
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tiny_models import Tiny, cond, gradient, pretend_training
from vader_nb.core import VaderError, make_generator
from vader_nb.memory.lora import MergedLora, add_lora, load_lora, lora_off, lora_parameters, save_lora, save_merged
from vader_nb.memory.lora import set_strength
from vader_nb.models.modelscope import load_modelscope
from vader_nb.zoo import load_model


@pytest.fixture
def model():
    return Tiny()


@pytest.fixture
def x():
    return torch.randn(2, 4, 3, 8, 8, generator=make_generator(0))


@torch.no_grad()
def test_lora_starts_at_the_base_and_switches_off(model, x):
    base = model.predict(x, 500, cond)
    learn = add_lora(model, rank=4, alpha=2)
    assert torch.allclose(model.predict(x, 500, cond), base, atol=1e-5) and not model.denoiser.training
    names = {n for n, p in model.denoiser.named_parameters() if p.requires_grad}
    assert len(names) == len(learn) and all('lora_' in n for n in names)
    pretend_training(model)
    assert not torch.allclose(model.predict(x, 500, cond), base, atol=1e-3)
    with lora_off(model):
        assert torch.allclose(model.predict(x, 500, cond), base, atol=1e-5)
    assert not torch.allclose(model.predict(x, 500, cond), base, atol=1e-3)
    assert all(p.requires_grad for p in learn)


def test_lora_update_is_alpha_over_rank(model):
    weight = dict(model.denoiser.named_parameters())[
        'mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight'
    ].clone()
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    layer = model.denoiser.base_model.model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    A, B, v = layer.lora_A['default'].weight, layer.lora_B['default'].weight, torch.randn(3, weight.shape[1])
    assert torch.allclose(layer(v), v @ (weight + 2 / 4 * B @ A).T, atol=1e-5)


def test_lora_depends_on_its_seed_alone():
    def made(seed, noise):
        torch.manual_seed(noise)
        weights = add_lora(Tiny(), seed=seed)
        return torch.cat([p.flatten() for p in weights]), torch.rand(1)

    (a, next_a), (b, _), (c, _) = made(0, 1), made(0, 2), made(1, 1)
    torch.manual_seed(1)
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(next_a, torch.rand(1))


def test_half_precision_base_keeps_float32_adapters(model):
    model.denoiser.half()
    assert {p.dtype for p in add_lora(model)} == {torch.float32}
    assert model.denoiser.base_model.model.conv_in.weight.dtype == torch.float16


def test_saved_lora_gives_the_same_count_frames_plain_diffusers(model, x, tmp_path):
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    config = json.loads((tmp_path / 'lora' / 'adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha']) == (4, 2) and {p.name for p in (tmp_path / 'lora').iterdir()} == {
        'adapter_config.json',
        'adapter_model.safetensors',
    }
    plain = Tiny()
    pipe = TextToVideoSDPipeline(plain.vae, None, None, plain.denoiser, plain.scheduler)
    pipe.unet = PeftModel.from_pretrained(pipe.unet, tmp_path / 'lora')
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(
        prompt_embeds=cond.embeds,
        negative_prompt_embeds=cond.uncond,
        latents=x,
        num_inference_steps=4,
        guidance_scale=3.0,
        height=16,
        width=16,
        num_frames=3,
        output_type='pt',
    ).frames
    sampler = model.sampler(4)
    with torch.no_grad():
        for i, t in enumerate(sampler.timesteps):
            x = sampler.step(i, x, model.predict(x, t, cond, 3.0)).x
        ours = model.decode(x / plain.vae.config.scaling_factor).clamp(0, 1)
    assert (ours - frames).abs().max() < 1e-4 and frames.std() > 0.01


def test_load_replaces_and_trains_on(model, x, tmp_path):
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    tuned = model.predict(x, 500, cond)
    other = Tiny()
    add_lora(other, rank=2, alpha=8)
    pretend_training(other, seed=9)
    learn = load_lora(other, tmp_path / 'lora')
    assert torch.equal(other.predict(x, 500, cond), tuned)
    assert len(learn) == len(lora_parameters(model)) and gradient(other, x).abs().sum() > 0


def test_bad_lora(model, tmp_path):
    with pytest.raises(VaderError, match='no whole LoRA'):
        load_lora(model, tmp_path)
    add_lora(model)
    with pytest.raises(VaderError, match='already'):
        add_lora(model)
    other = Tiny()
    other.lora_targets = ['to_nothing']
    with pytest.raises(VaderError, match='no layer'):
        add_lora(other)


@pytest.mark.parametrize('rank, alpha', [(0, 8), (1.5, 8), (True, 8), ('8', 8), (8, 0), (8, float('inf')), (8, '8')])
def test_rank_and_alpha_are_checked(rank, alpha, model):
    with pytest.raises(VaderError, match='must be a (whole )?number above 0'):
        add_lora(model, rank, alpha)


@pytest.mark.parametrize(
    'file, text',
    [
        ('adapter_model.safetensors', 'cut'),
        ('adapter_config.json', '{"peft_type": "LORA"'),
        ('adapter_config.json', '{}'),
    ],
)
def test_damaged_lora(file, text, model, x, tmp_path):
    "A file cut short is refused in one line, and the adapter that was there stays."
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    (tmp_path / 'lora' / file).write_text(text)
    before = model.predict(x, 500, cond)
    with pytest.raises(VaderError, match='no whole LoRA') as e:
        load_lora(model, tmp_path / 'lora')
    assert '\n' not in str(e.value) and torch.equal(model.predict(x, 500, cond), before)


def test_lora_of_another_network(model, tmp_path):
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    other = Tiny()
    other.denoiser = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(VaderError, match='another network'):
        load_lora(other, tmp_path / 'lora')


def without_prefix(tensors, config):
    return {k.removeprefix('base_model.model.'): v for k, v in tensors.items()}, config


def empty(tensors, config):
    return {}, config


def half(tensors, config):
    return dict(list(tensors.items())[::2]), config


def no_B(tensors, config):
    return {k: v for k, v in tensors.items() if 'lora_A' in k}, config


def one_nan(tensors, config):
    next(iter(tensors.values())).view(-1)[3] = float('nan')
    return tensors, config


def one_inf(tensors, config):
    next(iter(tensors.values())).view(-1)[3] = float('inf')
    return tensors, config


def all_B_zero(tensors, config):
    return {k: v * (0 if 'lora_B' in k else 1) for k, v in tensors.items()}, config


def all_A_zero(tensors, config):
    return {k: v * (0 if 'lora_A' in k else 1) for k, v in tensors.items()}, config


def too_large(tensors, config):
    return {k: v.sign() * 1e30 for k, v in tensors.items()}, config


def one_layer_of_alpha_nan(tensors, config):
    return tensors, config | dict(alpha_pattern={'to_q': float('nan')})


def one_layer_of_alpha_0(tensors, config):
    return tensors, config | dict(alpha_pattern={'to_q': 0})


def one_more(tensors, config):
    return tensors | {'base_model.model.conv_in.lora_A.weight': torch.zeros(4, 4)}, config


def another_rank(tensors, config):
    return tensors, config | dict(r=3)


def another_shape(tensors, config):
    return {k: v[:, 1:] if 'lora_A' in k else v for k, v in tensors.items()}, config


def loha(tensors, config):
    return tensors, config | dict(peft_type='LOHA')


def no_kind(tensors, config):
    return tensors, config | dict(peft_type=None)


def fewer_targets(tensors, config):
    return tensors, config | dict(target_modules=['to_q'])


def other_targets(tensors, config):
    return tensors, config | dict(target_modules=['to_nothing'])


def no_targets(tensors, config):
    return tensors, config | dict(target_modules=[])


def rank_0(tensors, config):
    return tensors, config | dict(r=0)


def rank_in_words(tensors, config):
    return tensors, config | dict(r='four')


def alpha_0(tensors, config):
    return tensors, config | dict(lora_alpha=0)


def alpha_nan(tensors, config):
    return tensors, config | dict(lora_alpha=float('nan'))


def alpha_below_0(tensors, config):
    return tensors, config | dict(lora_alpha=-1)


def alpha_in_words(tensors, config):
    return tensors, config | dict(lora_alpha='four')


def alpha_none(tensors, config):
    return tensors, config | dict(lora_alpha=None)


def alpha_true(tensors, config):
    return tensors, config | dict(lora_alpha=True)


def rank_none(tensors, config):
    return tensors, config | dict(r=None)


def rank_below_0(tensors, config):
    return tensors, config | dict(r=-4)


def rank_broken(tensors, config):
    return tensors, config | dict(r=4.5)


def whole_numbers(tensors, config):
    return {k: (v * 100).int() for k, v in tensors.items()}, config


def complex_numbers(tensors, config):
    return {k: v.to(torch.complex64) for k, v in tensors.items()}, config


def a_list(tensors, config):
    return tensors, [config]


def dora(tensors, config):
    return tensors, config | dict(use_dora=True)


def with_biases(tensors, config):
    return tensors, config | dict(bias='all')


def of_a_language_model(tensors, config):
    return tensors, config | dict(task_type='CAUSAL_LM')


def names_of_diffusers(tensors, config):
    return {k.replace('base_model.model.', 'unet.'): v for k, v in tensors.items()}, config


DAMAGES = [
    without_prefix,
    empty,
    half,
    no_B,
    one_nan,
    one_inf,
    all_B_zero,
    all_A_zero,
    too_large,
    one_layer_of_alpha_nan,
    one_layer_of_alpha_0,
    one_more,
    another_rank,
    another_shape,
    loha,
    no_kind,
    fewer_targets,
    other_targets,
    no_targets,
    rank_0,
    rank_in_words,
    alpha_0,
    alpha_nan,
    alpha_below_0,
    alpha_in_words,
    alpha_none,
    alpha_true,
    rank_none,
    rank_below_0,
    rank_broken,
    whole_numbers,
    complex_numbers,
    a_list,
    dora,
    with_biases,
    of_a_language_model,
    names_of_diffusers,
]


@pytest.mark.parametrize('tuned', [False, True])
@pytest.mark.parametrize('damage', DAMAGES)
def test_what_would_change_nothing_or_break_is_refused(damage, tuned, model, x, tmp_path):
    "One line, and the model stays as it was, adapter included."
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    tensors, config = damage(
        load_file(tmp_path / 'lora' / 'adapter_model.safetensors'),
        json.loads((tmp_path / 'lora' / 'adapter_config.json').read_text()),
    )
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / 'lora' / 'adapter_model.safetensors')
    (tmp_path / 'lora' / 'adapter_config.json').write_text(json.dumps(config))
    other = Tiny()
    if tuned:
        add_lora(other, rank=2)
        pretend_training(other, seed=9)
    weights, before = lora_parameters(other), other.predict(x, 500, cond)
    with pytest.raises(VaderError, match=str(tmp_path)) as e:
        load_lora(other, tmp_path / 'lora')
    assert '\n' not in str(e.value) and len(str(e.value)) < 600
    assert torch.equal(other.predict(x, 500, cond), before)
    assert all(a is b for a, b in zip(weights, lora_parameters(other), strict=True))


def test_loading_copies_no_weights(model, tmp_path):
    "The check looks at names and shapes only: a network of billions is not copied for it."
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    other = Tiny()
    before = {name: p.data_ptr() for name, p in other.denoiser.named_parameters()}
    load_lora(other, tmp_path / 'lora')
    after = {
        name.removeprefix('base_model.model.').replace('.base_layer', ''): p.data_ptr()
        for name, p in other.denoiser.named_parameters()
    }
    assert before.items() <= after.items()


def test_loading_draws_no_random_numbers(model, tmp_path):
    add_lora(model, rank=4)
    pretend_training(model)
    save_lora(model, tmp_path / 'lora')
    torch.manual_seed(5)
    load_lora(Tiny(), tmp_path / 'lora')
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def weights_of(model):
    return {n: p.clone() for n, p in model.denoiser.named_parameters()}


@torch.no_grad()
@pytest.mark.parametrize('dora', [False, True])
def test_a_merged_lora_predicts_the_same_and_leaves_no_trace(model, x, dora):
    add_lora(model, rank=4, alpha=2)
    if dora:
        from peft import LoraConfig, get_peft_model

        model = Tiny()
        model.denoiser = get_peft_model(
            model.denoiser, LoraConfig(r=4, target_modules=model.lora_targets, use_dora=True)
        ).eval()
    pretend_training(model)
    before, want = weights_of(model), model.predict(x, 500, cond)
    merged, calls = MergedLora(model), []
    watch = [
        m.register_forward_hook(lambda *a: calls.append(1))
        for n, m in model.denoiser.named_modules()
        if n.endswith('lora_A.default')
    ]
    for _ in range(3):
        with merged():
            assert torch.allclose(model.predict(x, 500, cond), want, atol=1e-5)
    assert watch and len(merged.layers) == len(watch) and not calls
    assert torch.equal(model.predict(x, 500, cond), want) and calls
    after = weights_of(model)
    assert all(torch.equal(after[n], before[n]) for n in before)
    with pytest.raises(RuntimeError), merged():
        raise RuntimeError
    assert torch.equal(model.predict(x, 500, cond), want)


@torch.no_grad()
def test_what_is_off_or_in_half_precision_is_not_merged(model, x):
    assert not MergedLora(model).layers
    add_lora(model, rank=4, alpha=2)
    pretend_training(model)
    with lora_off(model):
        base = model.predict(x, 500, cond)
        with MergedLora(model)():
            assert torch.equal(model.predict(x, 500, cond), base)
    with torch.autocast('cpu', torch.bfloat16):
        assert not MergedLora(model).layers
    model.denoiser.bfloat16()
    assert not MergedLora(model).layers


# Strength


def test_the_strength_scales_what_was_learnt():
    model = load_modelscope('small', 'cpu')
    cond, x = model.encode(['a panda riding a bike'], 4, 32, 32), model.noise(1, 4, 32, 32, make_generator(0))
    add_lora(model, rank=2)
    with torch.no_grad():
        for name, p in model.denoiser.named_parameters():
            if 'lora_B' in name:
                p.normal_(std=0.02, generator=make_generator(1))
        layer = next(m for m in model.denoiser.modules() if hasattr(m, 'lora_A'))
        delta = layer.get_delta_weight('default')
        full = model.predict(x, 500, cond, 1.0)
        set_strength(model, 0.5)
        assert torch.equal(layer.get_delta_weight('default'), 0.5 * delta)
        half = model.predict(x, 500, cond, 1.0)
        set_strength(model, 0)
        none = model.predict(x, 500, cond, 1.0)
        set_strength(model, 1)
        assert torch.equal(model.predict(x, 500, cond, 1.0), full) and not torch.allclose(half, full)
        with lora_off(model):
            assert torch.allclose(model.predict(x, 500, cond, 1.0), none)
    for bad in (float('nan'), '1', None, True):
        with pytest.raises(VaderError, match='but must be a number, such as 0.5'):
            set_strength(model, bad)
    with pytest.raises(VaderError, match='no LoRA whose strength'):
        set_strength(load_modelscope('small', 'cpu'), 0.5)


def test_merged_weights_of_a_network_of_ours(tmp_path):
    model = load_model('videocrafter', 'small', 'cpu')
    with pytest.raises(VaderError, match='has no LoRA that could be merged'):
        save_merged(model, tmp_path / 'merged')
    cond, x = model.encode(['a panda riding a bike'], 4, 32, 32), model.noise(1, 4, 32, 32, make_generator(0))
    add_lora(model, rank=2)
    pretend_training(model)
    set_strength(model, 0.5)
    save_merged(model, tmp_path / 'merged')
    plain = load_model('videocrafter', 'small', 'cpu')
    with torch.no_grad():
        base = plain.predict(x, 500, cond, 1.0)
        plain.denoiser.load_state_dict(load_file(tmp_path / 'merged/model.safetensors'))
        merged, tuned = plain.predict(x, 500, cond, 1.0), model.predict(x, 500, cond, 1.0)
    assert (merged - tuned).abs().max() < 1e-4 < (merged - base).abs().max()
