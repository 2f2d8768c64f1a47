import pytest

from tests.support import report_folders as folders

PROBES = ({"name": "mqar", "parameters": {"num_pairs": 4}, "length": 32, "lengths": [32, 64]},
          {"name": "parity", "length": 16, "lengths": [16, 32]})


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Two mixers by two ratios and two seeds; one point is half done. To be read, or copied."""
    vary = {"model.schedule.linear": ["kda", "gdn"], "model.schedule.ratio": [0, "inf"], "training.seed": [0, 1]}
    return folders.sweep_folder(tmp_path_factory.mktemp("report") / "sweep", vary, probes=PROBES,
                                unfinished=["linear-gdn_ratio-inf_seed-1"])
