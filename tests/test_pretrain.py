"How the small models are trained: the loop stops, resumes and refuses as it should; each training's data and losses."

import json, signal, subprocess, sys
from pathlib import Path

import pytest, torch
from tiny_training import toy, train
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vader_nb.core import VaderError, make_generator, read_json
from vader_nb.world.judge import QUESTIONS, Judge
from vader_nb.pretrain import aesthetic, clip, judge, light, modelscope, vae
from vader_nb.pretrain.loop import lr_at, options, pretrain, write_card
from vader_nb.rewards.aesthetic import Aesthetic, AestheticHead
from vader_nb.rewards.views import clip_normalise
from vader_nb.world.scenes import ANIMALS, draw, scenes
from vader_nb.world.rating import CORRUPTIONS, rate, rate_light
from vader_nb.world.captions import parse
from vader_nb.zoo import model_path

# The loop


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def lines(out):
    return [json.loads(line) for line in (Path(out) / 'metrics.jsonl').read_text().splitlines()]


def test_learning_rate():
    at = lambda step: lr_at(step, 1000, 0.1, warmup=100, decay=0.4)
    assert [at(0), at(49), at(99), at(300), at(600)] == pytest.approx([0.001, 0.05, 0.1, 0.1, 0.1])
    assert [at(800), at(999), at(1000)] == pytest.approx([0.05, 0.1 / 400, 0.0])
    rates = [at(i) for i in range(1001)]
    assert max(rates) == 0.1 and rates[600:] == sorted(rates[600:], reverse=True)


def test_it_learns_and_averages(tmp_path):
    net = toy().eval()
    x = torch.randn(200, 3, generator=make_generator(99))
    error = lambda: (net(x) - x.sum(1, keepdim=True)).pow(2).mean().item()
    before = error()
    avg = train(tmp_path, net, steps=200, lr=0.02, ema=0.9, save_every=1e9)
    last = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(avg)
    net.eval()
    assert error() < before / 3 and not equal(avg, last)
    assert equal(
        train(tmp_path / 'now', steps=5, ema=0.0),
        {k: v for k, v in torch.load(tmp_path / 'now/state.pt', weights_only=True)['model'].items()},
    ), 'no memory, no average'


def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path):
    whole = train(tmp_path / 'whole')
    for stop in (7, 31, 53):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / 'cut', stop=stop)
        assert torch.load(tmp_path / 'cut/state.pt', weights_only=True)['step'] == stop
    assert equal(train(tmp_path / 'cut'), whole)
    assert equal(train(tmp_path / 'cut'), whole), 'a finished run stays as it is'
    plain = lambda out: [{k: v for k, v in line.items() if k != 's_per_step'} for line in lines(out)]
    assert plain(tmp_path / 'cut') == plain(tmp_path / 'whole')
    assert [line['step'] for line in lines(tmp_path / 'cut')] == [50]


def test_metrics_after_the_last_state_are_cut(tmp_path):
    train(tmp_path, steps=120, save_every=1e9)
    state = torch.load(tmp_path / 'state.pt', weights_only=True)
    torch.save(state | dict(step=60), tmp_path / 'state.pt')
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 150, "lo')
    train(tmp_path, steps=120, save_every=1e9)
    assert [line['step'] for line in lines(tmp_path)] == [50, 100]


@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs kill -9')
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    run = [sys.executable, Path(__file__).with_name('tiny_training.py'), tmp_path / 'killed', '23']
    assert subprocess.run(run, capture_output=True).returncode == -signal.SIGKILL
    assert torch.load(tmp_path / 'killed/state.pt', weights_only=True)['step'] < 23
    assert equal(train(tmp_path / 'killed'), train(tmp_path / 'whole'))


def test_another_trainings_folder_is_refused(tmp_path):
    train(tmp_path, steps=5)
    before = (tmp_path / 'state.pt').read_bytes()
    for other in (dict(steps=6), dict(steps=5, seed=1), dict(steps=5, net=torch.nn.Linear(3, 1))):
        with pytest.raises(VaderError, match='belongs to another training.*use another folder'):
            train(tmp_path, **other)
    (tmp_path / 'state.pt').write_bytes(before[:200])
    with pytest.raises(VaderError, match='state.pt is damaged.*delete it') as e:
        train(tmp_path, steps=5)
    assert '\n' not in str(e.value)
    torch.save([1, 2], tmp_path / 'state.pt')
    with pytest.raises(VaderError, match='another training'):
        train(tmp_path, steps=5)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    with pytest.raises(VaderError, match=f'step 12.*loss is {bad}.*learning rate'):
        train(tmp_path, poison=lambda step: bad if step == 12 else 1.0)
    s = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert s['step'] == 12 and all(v.isfinite().all() for v in [*s['model'].values(), *s['avg']])


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    net = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    with pytest.raises(VaderError, match='gradient nan: lower'):
        pretrain(net, lambda g, step: (net(torch.zeros(1, 1)).abs().sqrt().sum(), {}), 3, tmp_path)
    assert not (tmp_path / 'state.pt').exists() and torch.equal(net.bias, torch.zeros(1))


def test_milestones_get_the_average(tmp_path):
    seen = []
    avg = train(tmp_path, steps=4, milestone=lambda weights, step: seen.append((step, weights)))
    assert [s for s, _ in seen] == [1, 2, 3, 4, 4] and equal(seen[-1][1], avg) and not equal(seen[0][1], avg)


def test_frozen_weights_stay(tmp_path):
    net = toy()
    net[0].requires_grad_(False)
    kept = net[0].weight.clone()
    avg = train(tmp_path, net, steps=3)
    assert (
        torch.equal(avg['0.weight'], kept)
        and not torch.equal(avg['3.weight'], toy()[3].weight)
        and list(avg) == list(net.state_dict())
    )


def test_a_card_is_written(tmp_path):
    write_card(tmp_path, 'A toy', 'Adds.', dict(data='drawn', steps=5), dict(error=0.1))
    assert read_json(tmp_path / 'card.json') == dict(
        title='A toy', training=dict(data='drawn', steps=5), quality=dict(error=0.1)
    )
    text = (tmp_path / 'README.md').read_text()
    assert (
        text.startswith('# A toy\n\nAdds.\n\n## Training\n\n') and '| steps | 5 |' in text and '| error | 0.1 |' in text
    )


def test_options():
    a = options(['--steps', '7', '--decoder'], 'train', steps=5, out='here', decoder=False)
    assert vars(a) == dict(steps=7, out='here', decoder=True) and vars(
        options([], 'train', steps=5, decoder=False)
    ) == dict(steps=5, decoder=False)
    with pytest.raises(SystemExit):
        options(['--stepps', '7'], 'train', out='')


# The VAE


@pytest.fixture(scope='module')
def small_vae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return vae.quick_start(vae.make_vae()).eval()


def test_latents_of_unit_scale(small_vae):
    import copy

    v, x = copy.deepcopy(small_vae), 2 * draw(scenes(64, 3, 'dull'), torch.tensor([2.0]))[:, 0] - 1
    with torch.no_grad():
        before = v.encode(x[:4]).latent_dist
        y = v.decode(before.mean).sample
        vae.unit_latents(v, make_generator(1), 128)
        after = v.encode(x[:4]).latent_dist
        assert (v.decode(after.mean).sample - y).abs().max() < 1e-4 * y.abs().max().clamp(min=1)
        z = v.encode(x).latent_dist.mean
        assert z.mean((0, 2, 3)).abs().max() < 0.2 and ((z.std((0, 2, 3)) - 1).abs() < 0.2).all()
        scale = before.mean.std((0, 2, 3)) / after.mean.std((0, 2, 3))
        assert torch.allclose(before.std / scale.view(1, 4, 1, 1), after.std, rtol=1e-3), (
            'the noise on a latent shrinks or grows with it'
        )
    assert vae.quality(small_vae, 4).keys() == {'PSNR dull (dB)', 'PSNR any (dB)', 'PSNR vivid (dB)'}


def test_vae_frames():
    sizes = set()
    for seed in range(12):
        x, cover, contrast = vae.frames(make_generator(seed), 6)
        n, _, h, w = x.shape
        assert (
            h == w
            and n == (6 if h <= 64 else 3)
            and cover.shape == (n, 1, h, h)
            and contrast.shape == (n,)
            and 0 <= x.min()
            and x.max() <= 1
        )
        sizes.add(h)
    assert len(sizes) > 2 and torch.equal(vae.frames(make_generator(3))[0], vae.frames(make_generator(3))[0])


def test_vae_losses_reach_what_they_train(small_vae):
    import copy

    v = copy.deepcopy(small_vae)
    loss, seen = vae.vae_loss(v, make_generator(0))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in v.parameters()) and seen['psnr'].isfinite()
    v.zero_grad()
    vae.decoder_loss(v, make_generator(0))[0].backward()
    assert all(p.grad is None for p in v.encoder.parameters()) and all(
        p.grad is not None for p in v.decoder.parameters()
    )


def test_hue_and_subject_weigh_more():
    x, one = torch.full((1, 3, 8, 8), 0.5), torch.ones(1)
    grey = x + torch.tensor([0.1, 0.1, 0.1]).view(3, 1, 1)
    tint = x + torch.tensor([0.1, -0.1, 0.1]).view(3, 1, 1)
    off, on = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    e = lambda y, cover, contrast=one: vae.error(y, x, cover, contrast)[0].item()
    assert (
        e(tint, off) > e(grey, off)
        and e(grey, on) == pytest.approx(4 * e(grey, off))
        and e(grey, off, 0.5 * one) > e(grey, off)
        and e(x, on) == 0
    )


# CLIP


def test_pictures_are_normalised_as_openai_does():
    x = torch.rand(2, 3, 4, 4, generator=make_generator(0))
    mean, std = (torch.tensor(o).view(3, 1, 1) for o in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    assert torch.allclose(clip_normalise(x), (x - mean) / std, atol=1e-6)


@pytest.fixture(scope='module')
def tok(tmp_path_factory):
    return clip.make_tokenizer(tmp_path_factory.mktemp('tok'))


def test_every_word_is_one_token(tok):
    assert all(len(tok.tokenize(w)) == 1 for w in clip.world_words()) and tok.model_max_length == clip.MAX_TOKENS
    assert tok('A Fox').input_ids == tok('a fox').input_ids and len(tok.tokenize('wombat')) > 1
    assert tok('', padding='max_length').input_ids[1:] == [tok.eos_token_id] * (clip.MAX_TOKENS - 1)


def test_captions_of_the_web_fit_and_tell_the_truth(tok):
    x, s, kinds, k, rating = clip.pictures(make_generator(3), 64)
    assert (
        x.shape == (64, 3, 64, 64)
        and set(kinds.tolist()) <= set(range(-1, len(CORRUPTIONS)))
        and 1 <= rating.min()
        and rating.max() <= 10
    )
    assert (
        torch.equal(rating[kinds < 0], rate(x)[kinds < 0])
        and (rating <= rate(x) + 1e-5).all()
        and 0.2 < (kinds >= 0).float().mean() < 0.5
    )
    texts = clip.web_captions(s, kinds, k, rating, make_generator(4))
    words = set(clip.world_words())
    assert (
        not {w for t in texts for w in t.split()} - words
        and max(len(tok(t).input_ids) for t in texts) <= clip.MAX_TOKENS
    )
    assert (
        [parse(t)['animal'] for t in texts] == s.animal.tolist()
        and any('picture of' in t for t in texts)
        and not any('a ugly' in t for t in texts)
    )


def test_clip_loss_counts_equal_captions_as_right(tok):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = clip.make_clip(len(tok), tok.eos_token_id)
    loss, seen = clip.clip_loss(net, tok, make_generator(0), 6)
    loss.backward()
    assert (
        loss.isfinite()
        and 0 <= seen['top1'] <= 1
        and net.vision_model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    )
    q = clip.quality(net.eval(), tok, 4)
    assert set(q) == {'animal', 'activity'} and all(v.endswith('%') for v in q.values())


# The judge


def test_judge_clips_and_loss():
    spread = {tuple((o - o[0]).round().tolist()) for o in (judge.moments(make_generator(i)) for i in range(20))}
    assert (0.0, 1.0, 2.0, 3.0) in spread and len(spread) == 2
    x, s, rating, framed = judge.clips(make_generator(1), 6)
    assert x.shape == (6, 4, 3, 64, 64) and len(s) == 6 and rating.shape == (6,) and isinstance(framed, bool)
    loss, seen = judge.judge_loss(Judge((8, 8, 8, 8)), make_generator(2), 6)
    assert loss.isfinite() and {'animal', 'activity', 'obj', 'hat', 'rating_rmse'} <= set(seen)
    q = judge.quality(Judge((8, 8, 8, 8)).eval(), 10)
    assert set(q) == {f'{k}, {how}' for k in QUESTIONS for how in ('clean', 'spoiled')} | {
        'rating: correlation with the rule'
    }


# ModelScope


def test_a_chunk_is_drawn_once(small_vae, tmp_path):
    z, text = modelscope.chunk(3, tmp_path, small_vae, 4)
    assert z.shape == (4, 4, 8, 4, 4) and z.dtype == torch.float16 and len(text) == 4, (
        'the fourth chunk is 32 pixels wide'
    )
    again = modelscope.chunk(3, tmp_path, None, 4)
    assert torch.equal(again[0], z) and again[1] == text
    other = modelscope.chunk(3, tmp_path / 'other', small_vae, 4)
    assert torch.equal(other[0], z) and other[1] == text


def test_the_denoisers_loss(small_vae, tok, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text_tower, unet = (
            clip.make_clip(len(tok), tok.eos_token_id).text_model.eval().requires_grad_(False),
            modelscope.make_unet(),
        )
    modelscope.chunk(0, tmp_path, small_vae, 4)
    modelscope.chunk(1, tmp_path, small_vae, 4)
    batches = modelscope.Batches(tmp_path, None, text_tower, tok, chunks=range(2), batch=2)
    loss, seen = modelscope.unet_loss(unet, batches, make_generator(0), available=1)
    assert len(batches.data) == 1 and loss.isfinite() and seen['size'] == 64
    z, text = batches(make_generator(5), 2)
    assert len(batches.data) == 2 and z.shape == (2, 4, 8, 8, 8) and text.shape == (2, clip.MAX_TOKENS, 64)
    dropped = [bool((t == batches.empty[0]).all()) for i in range(100) for t in batches(make_generator(i), 2)[1]]
    assert 8 <= sum(dropped) <= 32, 'one caption in ten is empty'


def test_the_evaluation_prompts():
    asked = [parse(p) for p in modelscope.eval_prompts()]
    assert len(asked) == 200 and all(a['hat'] == -1 and a['activity'] < 3 for a in asked[:120])
    assert all(a['hat'] == 1 for a in asked[120:160]) and {a['activity'] for a in asked[160:]} == {3, 4}
    assert all(
        {a['animal'] for a in asked[i:j]} == set(range(len(ANIMALS))) for i, j in ((0, 120), (120, 160), (160, 200))
    )


# The aesthetic head


def test_decoded_frames_and_their_ratings(small_vae):
    x, rating = aesthetic.decoded(make_generator(0), 6, small_vae)
    assert x.shape == (6, 3, 64, 64) and 0 <= x.min() and x.max() <= 1 and rating.shape == (6,)
    assert (rating >= 1).all() and (rating <= rate(x) + 1e-5).all()
    assert torch.equal(x, aesthetic.decoded(make_generator(0), 6, small_vae)[0])


def test_a_data_set_of_ratings(small_vae, tok):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    eyes = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=32,
            projection_dim=8,
        )
    ).eval()
    E, R = aesthetic.dataset(Aesthetic(eyes, AestheticHead((8, 8, 8, 8, 4))), small_vae, 200, 0)
    assert E.shape == (128, 8) and R.shape == (128,) and 1 <= R.min() and R.max() <= 10
    q = aesthetic.quality(AestheticHead((8, 8, 8, 8, 4)).eval(), E, R)
    assert set(q) == {'RMSE', 'correlation'} and q['RMSE'] >= 0


def test_hats_are_not_taught_twice(tmp_path):
    with pytest.raises(VaderError, match='been through this course'):
        modelscope.main(
            [
                '--hats',
                '--out',
                str(tmp_path),
                *[
                    w
                    for k, name in dict(to='modelscope', vae='vae', clip='clip').items()
                    for w in (f'--{k}', str(model_path(name)))
                ],
            ]
        )


# The reward of light


@pytest.mark.parametrize('way', light.WAYS)
def test_each_way_of_treating_a_picture(small_vae, way):
    x, r = way(make_generator(3), 8, small_vae)
    assert x.shape == (8, 1, 3, 64, 64) and 0 <= x.min() and x.max() <= 1
    assert (r >= 1).all() and (r <= rate_light(x) + 1e-5).all(), 'no more than the pixels deserve'
    again = way(make_generator(3), 8, small_vae)
    assert torch.equal(again[0], x) and torch.equal(again[1], r)


def test_a_missing_subject_is_rated_low(small_vae):
    assert light._gone(make_generator(1), 16, small_vae)[1].max() < 3


def tiny_light():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=64, patch_size=32, projection_dim=8, **size))
    return Aesthetic(tower, AestheticHead((8, 8, 8, 8, 4)))


def test_pictures_and_their_ratings(small_vae):
    x, r = light.dataset(small_vae, 70, 0)
    assert x.shape == (64, 3, 64, 64) and x.dtype == torch.uint8 and r.shape == (64,) and 1 <= r.min() and r.max() <= 10
    q = light.quality(tiny_light(), x, r)
    assert set(q) == {'RMSE', 'correlation'} and q['RMSE'] >= 0


def test_the_loss_trains_tower_and_head():
    reward = tiny_light().requires_grad_(True)
    pictures = torch.randint(256, (20, 3, 64, 64), generator=make_generator(0), dtype=torch.uint8)
    loss, seen = light._loss(reward, pictures, torch.full((20,), 3.0), make_generator(1))
    loss.backward()
    assert loss.item() == pytest.approx(seen['rmse'].item() ** 2, rel=1e-4)
    grads = [reward.clip.vision_model.embeddings.patch_embedding.weight.grad, reward.head.layers[0].weight.grad]
    assert all(g.abs().sum() > 0 for g in grads)
