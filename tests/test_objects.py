"Object removal: published preprocessing and post-processing, the two forms, boxes and matching of the small detector."

from itertools import permutations

import pytest, torch
import torch.nn.functional as F
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from vader_nb.core import VaderError, make_generator
from vader_nb.pretrain.objects import (
    PatchDetector,
    assign,
    average_precision,
    borrow,
    boxes,
    detection_loss,
    make_yolos,
    match,
    patch_truth,
    surround,
    targets,
)
from vader_nb.rewards.base import check_reward, reward_gradient
from vader_nb.rewards import objects
from vader_nb.rewards.objects import (
    GroundingDino,
    ObjectRemoval,
    Yolos,
    detector_size,
    detector_view,
    hard_confidence,
    load_objects,
    smooth_max,
)
from vader_nb.rewards.views import imagenet_normalise
from vader_nb.world.scenes import draw, scenes


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def tiny_yolos(names=('N/A', 'book', 'cup'), **more):
    config = YolosConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=(32, 32),
        patch_size=16,
        num_detection_tokens=4,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        initializer_range=0.3,
        **more,
    )
    net = seeded(lambda: YolosForObjectDetection(config))
    net.vit.embeddings.detection_tokens.data = 2 * torch.randn(
        1, 4, 24, generator=make_generator(1)
    )  # born equal, queries would stay equal
    return net


def tiny_grounding():
    swin = dict(
        model_type='swin',
        image_size=32,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_indices=[2, 3, 4],
    )
    bert = dict(
        model_type='bert',
        vocab_size=12,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return seeded(
        lambda: GroundingDinoForObjectDetection(
            GroundingDinoConfig(
                backbone_config=swin,
                text_config=bert,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                num_queries=6,
                encoder_n_points=2,
                decoder_n_points=2,
            )
        )
    )


@pytest.fixture
def tokenizer():
    return BertTokenizer(vocab={w: i for i, w in enumerate('[PAD] [UNK] [CLS] [SEP] [MASK] book cup . a red'.split())})


@pytest.fixture
def video():
    return torch.rand(2, 3, 3, 40, 48, generator=make_generator(5)) * 0.8 + 0.1


# Preprocessing


@pytest.mark.parametrize(
    'h, w', [(256, 256), (320, 512), (512, 320), (240, 426), (64, 64), (100, 400), (800, 900), (801, 1400), (37, 1000)]
)
@pytest.mark.parametrize('shorter, longer', [(800, 1333), (512, 864)])
def test_size_is_the_processors(h, w, shorter, longer):
    from transformers.models.grounding_dino.image_processing_grounding_dino import get_size_with_aspect_ratio
    from transformers.models.yolos.image_processing_yolos import get_size_with_aspect_ratio_yolos

    assert detector_size(h, w, shorter, longer, 16) == get_size_with_aspect_ratio_yolos((h, w), shorter, longer)
    assert detector_size(h, w, shorter, longer) == get_size_with_aspect_ratio((h, w), shorter, longer)


@pytest.mark.parametrize('h, w', [(64, 64), (40, 64), (97, 61), (120, 30)])
def test_view_is_what_the_processor_makes(h, w):
    "On whole-numbered pixels, up to the processor's rounding to 1/255 after the resize."
    u8 = F.interpolate(torch.rand(1, 3, 9, 9, generator=make_generator(h)) * 255, (h, w), mode='bilinear')[0].byte()
    theirs = YolosImageProcessor(size=dict(shortest_edge=64, longest_edge=128), do_pad=False)(
        u8, return_tensors='pt'
    ).pixel_values
    ours = detector_view(u8[None] / 255, 64, 128, 16)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 1.1 / 255 / 0.224


def test_view_of_the_right_size_is_untouched():
    x = torch.rand(2, 3, 64, 96)
    assert torch.equal(detector_view(x, 64, 128, 16), imagenet_normalise(x))


def test_every_pixel_gets_a_gradient():
    x = torch.rand(1, 3, 200, 300, requires_grad=True)
    detector_view(x, 32, 64, 16).square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.99


# The two forms


def test_smooth_max_in_closed_form():
    p = torch.tensor([[0.8, 0.5, 0.0]]).double()
    want = 0.1 * torch.log((torch.exp(torch.tensor(8.0)) + torch.exp(torch.tensor(5.0)) + 1) / 3)
    assert torch.allclose(smooth_max(p, 0.1), want.double())
    assert torch.allclose(smooth_max(torch.full((1, 7), 0.3)), torch.tensor([0.3]))


def test_smooth_max_lies_between_mean_and_maximum_and_its_weights_add_up_to_one():
    p = torch.rand(50, 100, generator=make_generator(0)).double().requires_grad_()
    m = smooth_max(p)
    assert (
        (m <= p.amax(1)).all()
        and (m >= p.mean(1)).all()
        and (p.amax(1) - m).max() <= 0.02 * torch.log(torch.tensor(100.0))
    )
    (g,) = torch.autograd.grad(m.sum(), p)
    assert (g >= 0).all() and torch.allclose(g.sum(1), torch.ones(50).double())


def test_hard_confidence_is_the_published_post_processing():
    net, video = (
        tiny_yolos().eval(),
        torch.rand(5, 3, 32, 32, generator=make_generator(3)) * torch.linspace(0, 1, 5).view(5, 1, 1, 1),
    )
    eyes, processor = Yolos(net, 'cup', 32, 32), YolosImageProcessor(size=dict(shortest_edge=32, longest_edge=32))
    found = eyes(video)
    results = processor.post_process_object_detection(net(imagenet_normalise(video)), threshold=0.2)
    want = torch.stack(
        [r['scores'][r['labels'] == 2].mean() if (r['labels'] == 2).any() else torch.tensor(0.0) for r in results]
    )
    assert (
        torch.allclose(hard_confidence(found.confidence, found.mine, 0.2), want)
        and want.max() > 0
        and want.min() < want.max()
    )


def test_hard_form_has_no_gradient_below_the_threshold_and_the_smooth_one_has():
    p = torch.tensor([[0.19, 0.1]], requires_grad=True)
    hard = hard_confidence(p, torch.ones(1, 2, dtype=torch.bool), 0.2)
    assert hard.item() == 0 and torch.autograd.grad(hard.sum(), p)[0].abs().max() == 0
    assert torch.autograd.grad(smooth_max(p).sum(), p)[0].sum() == pytest.approx(1)


# The reward


def test_contract(video):
    check_reward(ObjectRemoval(Yolos(tiny_yolos(), 'book', 32, 64)), video)


def test_reward_is_one_minus_the_mean_confidence_of_the_frames(video):
    reward = ObjectRemoval(Yolos(tiny_yolos(), 'cup', 32, 64))
    alone = torch.stack([1 - smooth_max(reward.detector(clip).confidence).mean() for clip in video])
    assert torch.allclose(reward(video), alone, atol=1e-6)


def test_confidence_is_the_networks_own(video):
    net = tiny_yolos().eval()
    theirs = net(detector_view(video[0], 32, 64, 16)).logits.softmax(-1)[..., 2]
    assert torch.allclose(Yolos(net, 'cup', 32, 64)(video[0]).confidence, theirs, atol=1e-6)


def test_hard_form_fails_the_contract_where_nothing_is_seen(video):
    reward = ObjectRemoval(Yolos(tiny_yolos(), 'book', 32, 64), 'hard')
    reward.detector.threshold = 0.99
    with pytest.raises(VaderError, match='gradient of zero'):
        check_reward(reward, video)


def test_half_precision_counts_in_float32(video):
    reward = ObjectRemoval(Yolos(tiny_yolos(), 'book', 32, 64))
    full = reward(video)
    reward.detector.net.to(torch.bfloat16)
    half = reward(video)
    assert half.dtype == torch.float32 and (half - full).abs().max() < 0.05


def test_bad_input(video):
    with pytest.raises(VaderError, match="no 'dragon': use one of book, cup$"):
        Yolos(tiny_yolos(), 'dragon')
    with pytest.raises(VaderError, match="no 'N/A'"):
        Yolos(tiny_yolos(), 'N/A')
    with pytest.raises(VaderError, match="unknown form 'soft'"):
        ObjectRemoval(Yolos(tiny_yolos()), 'soft')
    with pytest.raises(VaderError, match='unknown detector'):
        load_objects(detector='rcnn')
    with pytest.raises(VaderError, match='only at the full scale'):
        load_objects('small', detector='grounding_dino')
    with pytest.raises(VaderError, match='not finite'):
        ObjectRemoval(Yolos(tiny_yolos(), 'book', 32, 64))(video * float('nan'))


# Grounding DINO


def test_grounding_dino_through_the_same_reward(tokenizer, video):
    """All of the contract but finite differences: transformers' decoder detaches its boxes at each refinement, as DETRs
    do in training.
    """
    reward = ObjectRemoval(GroundingDino(tiny_grounding(), tokenizer, 'book', 32, 64))
    with torch.no_grad():
        alone = torch.cat([reward(v[None]) for v in video])
    scores, grad = reward_gradient(reward, video)
    assert torch.allclose(scores, alone, atol=1e-3) and ((0 <= scores) & (scores <= 1)).all()
    assert grad.isfinite().all() and (grad.flatten(2).norm(dim=2) > 0).all()


def test_grounding_dino_is_the_published_processing(tokenizer):
    "The processor's pixels, words and scores on whole-numbered frames."
    net, u8 = tiny_grounding().eval(), (torch.rand(2, 3, 32, 48, generator=make_generator(2)) * 255).byte()
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessor(size=dict(shortest_edge=32, longest_edge=64)), tokenizer
    )
    inputs, ours = (
        processor(images=list(u8), text=['a red cup.'] * 2, return_tensors='pt'),
        detector_view(u8 / 255, 32, 64),
    )
    assert (inputs['pixel_values'] - ours).abs().max() < 1e-6
    theirs = processor.post_process_grounded_object_detection(net(**{**inputs, 'pixel_values': ours}), threshold=0.0)
    found = GroundingDino(net, tokenizer, 'A red cup ', 32, 64)(u8 / 255)
    for r, p in zip(theirs, found.confidence):
        assert torch.allclose(r['scores'], p, atol=0.02)  # random weights blow up the last bit
    assert found.mine.all()


@pytest.mark.parametrize('words', ['', ' ', 'book. cup'])
def test_grounding_dino_wants_one_phrase(tokenizer, words):
    with pytest.raises(VaderError, match='no phrase'):
        GroundingDino(tiny_grounding(), tokenizer, words)


# Loading


@pytest.mark.parametrize('detector', ['yolos', 'grounding_dino'])
def test_load_from_published_layout(detector, tmp_path, monkeypatch, tokenizer, video):
    net = tiny_yolos() if detector == 'yolos' else tiny_grounding()
    processor = (YolosImageProcessor if detector == 'yolos' else GroundingDinoImageProcessor)(
        size=dict(shortest_edge=32, longest_edge=48)
    )
    for part in (net, processor, tokenizer):
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(objects, 'model_path', lambda name, scale: tmp_path)
    reward = load_objects('full', 'cpu', target='cup', detector=detector)
    mine = Yolos(net, 'cup', 32, 48) if detector == 'yolos' else GroundingDino(net, tokenizer, 'cup', 32, 48)
    assert reward.name == 'no cup' and torch.allclose(reward(video), ObjectRemoval(mine)(video), atol=1e-5)


def test_size_of_an_older_settings_file(tmp_path):
    "The published files say size and max_size."
    (tmp_path / 'preprocessor_config.json').write_text(
        '{"size": 512, "max_size": 864, "image_processor_type": "YolosFeatureExtractor"}'
    )
    tiny_yolos().save_pretrained(tmp_path)
    assert objects.load_yolos(tmp_path).size == (512, 864, 16)


# The small detector

small = pytest.mark.skipif(
    not (objects.model_path('clip').parent / 'yolos').exists(), reason='the small detector is not there yet'
)


@small
def test_small_detector_tells_books_from_no_books():
    for obj in ('book', 'cup'):
        reward = load_objects(target=obj)
        with torch.no_grad():
            there, gone = [reward(draw(scenes(40, 77, 'any', obj=o), torch.tensor([2.0]))) for o in (obj, 'nothing')]
        assert there.mean() < 0.5 and gone.mean() > 0.9


@small
def test_small_detector_passes_the_contract():
    check_reward(load_objects(), draw(scenes(2, 5, 'any', obj=['book', 'nothing']), 2))


def test_boxes_surround_what_they_should():
    mask = torch.zeros(3, 20, 40, dtype=torch.bool)
    mask[0, 5:10, 8:28] = True
    mask[1, 3:5, :] = True
    found = surround(mask)
    assert torch.allclose(found[0], torch.tensor([18 / 40, 7.5 / 20, 0.5, 0.25])) and found[1:].isnan().all()


def test_boxes_of_scenes():
    s = scenes(3, 3, 'any', obj=['nothing', 'book', 'cup'], activity='playing chess', side=1)
    found = boxes(s, torch.tensor([2.0]))
    assert (~found.isnan().any(-1)).tolist() == [[False, False], [True, False], [False, True]]
    for box in (found[1, 0], found[2, 1]):
        assert box[0] < 0.3 and box[1] > 0.6 and ((box[2:] > 0.1) & (box[2:] < 0.25)).all()


def test_assignment_is_the_cheapest():
    for seed in range(10):
        cost = torch.rand(5, 3, generator=make_generator(seed))
        best = min(sum(cost[i, j] for j, i in enumerate(way)) for way in permutations(range(5), 3))
        chosen = assign(cost)
        assert len(set(chosen.tolist())) == 3 and cost[chosen, torch.arange(3)].sum() == pytest.approx(best.item())
    assert assign(torch.zeros(5, 0)).shape == (0,)


def test_match_is_transformers_own():
    pytest.importorskip('scipy')
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    matcher = HungarianMatcher(1, 5, 2)
    g = make_generator(1)
    out = dict(logits=torch.randn(6, 5, 3, generator=g), pred_boxes=torch.rand(6, 5, 4, generator=g) * 0.4 + 0.3)
    truth = [
        dict(class_labels=torch.tensor([0, 1])[:n], boxes=torch.rand(n, 4, generator=g) * 0.4 + 0.3)
        for n in (2, 1, 0, 2, 1, 2)
    ]
    pairs = lambda rows: [sorted(zip(i.tolist(), j.tolist())) for i, j in rows]
    assert pairs(match(out, truth)) == pairs(matcher(out, truth))


def test_loss_is_transformers_own():
    pytest.importorskip('scipy')
    net = seeded(make_yolos).eval()
    s = scenes(4, 2, 'any', obj=['nothing', 'book', 'cup', 'book'])
    x, truth = draw(s, torch.tensor([1.0]))[:, 0], boxes(s, torch.tensor([1.0]))
    net.config.eos_coefficient = 0.4
    theirs = net(imagenet_normalise(x), labels=targets(truth))
    ours = detection_loss(theirs.logits, theirs.pred_boxes, truth)
    for k, v in ours.items():
        assert torch.allclose(v, theirs.loss_dict[k], atol=1e-5)


def test_pupil_answers_as_its_detector():
    net, x = seeded(make_yolos).eval(), torch.rand(2, 3, 64, 64, generator=make_generator(0))
    logits, guesses, patches = PatchDetector(net)(x)
    out = net(imagenet_normalise(x))
    assert (
        torch.allclose(logits, out.logits) and torch.allclose(guesses, out.pred_boxes) and patches.shape == (2, 64, 3)
    )


def test_patch_truth():
    truth = torch.full((2, 2, 4), torch.nan)
    truth[0, 1] = torch.tensor([0.25, 0.75, 0.25, 0.25])
    shown = patch_truth(truth).view(2, 8, 8)
    assert (shown[1] == 2).all() and (shown[0] == 1).nonzero().tolist() == [[5, 1], [5, 2], [6, 1], [6, 2]]


def test_average_precision_in_closed_form():
    b = torch.tensor([0.5, 0.5, 0.2, 0.2])
    off = b + torch.tensor([0.3, 0, 0, 0])
    none = torch.full((4,), torch.nan)
    ap = lambda p, g, t: average_precision(torch.tensor(p), torch.stack([torch.stack(o) for o in g]), torch.stack(t))
    assert ap([[0.9, 0.1], [0.8, 0.3]], [[b, off], [b, off]], [b, b]) == pytest.approx(1)
    assert ap([[0.9, 0.1], [0.8, 0.3]], [[b, off], [off, b]], [b, b]) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert ap([[0.9, 0.8], [0.2, 0.1]], [[b, b], [b, off]], [b, b]) == pytest.approx(
        0.5 + 0.5 * 2 / 3
    )  # found twice counts once
    assert ap([[0.5, 0.1], [0.9, 0.1]], [[b, off], [b, off]], [b, none]) == pytest.approx(0.5)
    assert ap([[0.9, 0.8]], [[off, off]], [b]) == 0


def test_borrowed_layers_compute_what_clip_computes():
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = seeded(
        lambda: CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            )
        )
    ).eval()
    net, h = tiny_yolos(hidden_act='quick_gelu').eval(), torch.randn(2, 5, 24, generator=make_generator(0))
    borrow(net.vit.encoder.layer, clip)
    with torch.no_grad():
        a = b = h
        for mine, theirs in zip(net.vit.encoder.layer, clip.vision_model.encoder.layers):
            first = lambda o: o[0] if isinstance(o, tuple) else o
            a, b = first(mine(a)), first(theirs(b, None))
    assert torch.allclose(a, b, atol=1e-5)
