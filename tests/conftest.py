"What all tests share. The package comes before torch: it says how the threads of torch wait."

import pytest

import vader_nb.core


@pytest.fixture(scope='module', autouse=True)
def default_device():
    """Models and rewards go to the CPU where a test names no device, for its videos are made there; on a machine with a
    GPU, too. A module that wants the library's own rule has a fixture of this name.
    """
    pick = vader_nb.core.pick_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vader_nb.core, 'pick_device', lambda name=None: pick(name or 'cpu'))
        yield
