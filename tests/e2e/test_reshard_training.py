"""A run under torchrun whose data is cut anew in its middle, and that goes on with more ranks."""

import pytest

from preprocess.reshard.plan import ReshardSettings, plan_reshard
from preprocess.reshard.run import reshard
from shardspec.manifest import require_manifest
from tests.e2e.test_elastic_processes import torchrun
from tests.inline import Quiet


@pytest.fixture(scope="module")
def source(tiny_sample, write_dataset, tmp_path_factory):
    samples = [tiny_sample(i, num_images=i % 2) for i in range(61)]
    folder = tmp_path_factory.mktemp("training") / "source"
    return write_dataset(folder, samples, num_shards=3, several=True)


def cut_anew(source, out, form):
    settings = ReshardSettings(
        sources=(source,), out=str(out), num_shards=8, form=form, num_workers=2
    )
    reshard(plan_reshard(settings, Quiet()), Quiet())
    manifest = require_manifest(str(out))
    assert len(manifest.shards) == 8
    assert (manifest.view is not None) == (form == "view")
    return str(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind, forms", [("one", ("view", "copy")), ("packed", ("view",))])
def test_a_run_continues_with_data_that_was_cut_again(kind, forms, source, tmp_path):
    # Over the end of the first epoch of 61 samples, in global batches of 8.
    want, _ = torchrun(tmp_path, kind, [source], processes=2, count=10)
    first, state = torchrun(tmp_path, kind, [source], processes=2, count=4)
    assert first == want[:4]
    for form in forms:
        url = cut_anew(source, tmp_path / form, form)
        rest, _ = torchrun(tmp_path, kind, [url], processes=4, count=6, state=state)
        assert rest == want[4:]
