"Settings of older runs."

import pytest
from vader_nb.core import VaderError
from vader_nb.training.run_folder import check_folder


def test_settings_of_an_older_run_are_read_under_todays_names(tmp_path):
    from vader_nb.config import read_config
    from vader_nb.core import read_json, write_json
    from vader_nb.records import recorded

    (folder,) = recorded('modelscope-action-small-0')
    old, c = read_json(folder / 'config.json'), read_config(folder)
    assert 'train_steps' not in old and (c.train_steps, c.batch_size, c.max_grad_norm, c.mixed_precision) == (
        old['steps'],
        old['batch'],
        old['clip'],
        old['precision'],
    )
    write_json(tmp_path / 'config.json', dict(old, tricks='layers slices turns'))
    assert read_config(tmp_path).tricks == 'checkpointing vae_slicing model_offload'
    check_folder(
        tmp_path,
        dict(train_steps=99, batch_size=old['batch'], tricks='checkpointing vae_slicing model_offload'),
        resume=True,
    )
    with pytest.raises(VaderError, match='batch_size'):
        check_folder(tmp_path, dict(batch_size=old['batch'] + 1), resume=True)
    write_json(tmp_path / 'config.json', dict(steps=3))
    with pytest.raises(VaderError, match='not written by vader run'):
        read_config(tmp_path)
