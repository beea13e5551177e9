"Comparisons: as many rewards for each method, runs that go on where they were, what is read off."

from dataclasses import replace

import pytest
import torch
from tiny_run import PROMPTS, TESTS, TINY
from vader_nb import zoo
from vader_nb.config import Config
from vader_nb.core import read_json
from vader_nb.experiments import comparison, registry
from vader_nb.experiments.comparison import COMPARISONS, VARIANTS, Comparison, compare, needed, plan_runs
from vader_nb.experiments.comparison import spent_and_gained, steps_for
from vader_nb.experiments.registry import experiment_config


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    "An experiment on a tiny model, with judges that always see everything."
    monkeypatch.setitem(zoo.MODELS, 'tiny', 'tiny_run:load_tiny')
    monkeypatch.setitem(zoo.REWARDS, 'bright', 'tiny_run:load_bright')
    parts = 'nowhere', 'to test', 'tiny', 'bright', lambda scale: (PROMPTS, TESTS)
    monkeypatch.setitem(registry.EXPERIMENTS, 'tiny', registry.Experiment(*parts, dict(TINY)))
    for place in (comparison, registry):
        monkeypatch.setattr(place, 'judge_clips', lambda video, prompts: dict(animal=torch.ones(len(prompts))))
    monkeypatch.setattr(comparison, 'diversity', lambda clips: dict(hue=0.5))


@pytest.mark.parametrize(
    'config',
    [
        Config(batch_size=4, gradient_accumulation_steps=2),
        Config(method='ddpo', eta=1.0, T=10, K=1, batch_size=16, gradient_accumulation_steps=5, inner_epochs=2),
        Config(method='dpo', batch_size=8, inner_epochs=4, experience_batches=2),
    ],
)
def test_steps_for_a_number_of_queries(config):
    steps = steps_for(config, 96)
    passes = config.experience_batches * config.inner_epochs * (config.T if config.method == 'ddpo' else 1)
    if config.method == 'vader':
        asked = steps * 8
    else:
        asked = steps * config.gradient_accumulation_steps / passes * config.batch_size * config.experience_batches
    assert asked == 96
    assert steps_for(config, 97) > steps


def test_a_run_asks_for_the_planned_number_of_rewards(tmp_path):
    small = dict(T=3, K=1, batch_size=2, gradient_accumulation_steps=1, decoded_frames=2, train_steps=2)
    planned = Comparison('', '', ['tiny'], VARIANTS, queries=4, seeds=1, points=1)
    asked = {name: record['reward_queries'] for name, record in compare(planned, tmp_path, device='cpu', **small)}
    assert asked == dict.fromkeys(plan_runs(planned, **small), 4) and len(asked) == 4
    for name in asked:
        final = read_json(tmp_path / name / 'final.json')
        assert set(final) == {'before', 'after'} and set(final['after']) == {'train', 'test'}
        assert {'reward', 'animal', 'diversity of hue'} <= set(final['after']['test'])
    base = [read_json(tmp_path / name / 'final.json')['before'] for name in asked]
    assert all(scores == base[0] for scores in base), 'all are evaluated alike, so the base model is the same'
    assert list(compare(planned, tmp_path, device='cpu', **small)) == [], 'what is finished is kept'


def test_an_interrupted_comparison_goes_on(tmp_path):
    small = dict(T=3, K=1, batch_size=2, save_every=1, train_steps=3)
    planned = Comparison('', '', ['tiny'], {'vader': VARIANTS['vader']}, seeds=1, points=1)
    for name, record in compare(planned, tmp_path, device='cpu', **small):
        if record['step'] == 2:
            break
    assert [record['step'] for name, record in compare(planned, tmp_path, device='cpu', **small)] == [3]


@pytest.mark.parametrize('name', COMPARISONS)
def test_planned_runs_make_sense(name):
    runs = plan_runs(COMPARISONS[name])
    assert len(runs) == len(set(runs)) > 2
    for run, config in runs.items():
        own = 100 if name == 'resolution-scaling' else experiment_config(config.experiment).train_steps
        planned = own if config.method == 'vader' else steps_for(config, COMPARISONS[name].queries)
        assert config.train_steps == planned >= config.eval_every
        assert run.startswith(config.experiment) and run.endswith(f'-small-{config.seed}')


def test_a_flow_model_is_compared_by_vader_alone():
    methods = {c.method for c in plan_runs(COMPARISONS['generalization']).values() if c.experiment.startswith('svd')}
    assert methods == {'vader'}


def test_what_was_spent_by_each_evaluation(tmp_path):
    list(registry.run(replace(registry.experiment_config('tiny'), train_steps=4, eval_every=2), tmp_path, 'cpu'))
    lines = spent_and_gained(tmp_path)
    assert [line['step'] for line in lines] == [0, 2, 4] and [line['queries'] for line in lines] == [0, 4, 8]
    assert lines[0]['passes'] == 0 < lines[1]['passes'] < lines[2]['passes'] and 'animal' in lines[0]


def test_what_a_level_needs():
    lines = [dict(queries=q, passes=10 * q, reward=r) for q, r in ((0, 4.0), (100, 5.0), (200, 4.5), (300, 7.0))]
    assert (
        needed(lines, 4.5) == 50 and needed(lines, 5.0) == 100 and needed(lines, 6.0, 'passes') == pytest.approx(2600)
    )
    assert needed(lines, 3.0) == 0 and needed(lines, 8.0) is None


def test_the_recorded_search_is_read_whole():
    from vader_nb.records import read_lines, recorded

    path = recorded('search')[0] / 'modelscope-aesthetic.jsonl'
    lines = read_lines(path)
    assert len(lines) == len(path.read_text().splitlines()) > 0
    assert all({'method', 'changes', 'queries', 'reward before', 'reward after'} <= set(line) for line in lines)
