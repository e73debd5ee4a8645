"""The public names are what they are said to be; tests/test_docs.py runs the README."""

import dspfx


def test_public_names() -> None:
    verbs = [
        "channel_graph",
        "cluster_groups",
        "compile",
        "convert",
        "export",
        "get_masks",
        "load",
        "load_checkpoint",
        "prepare",
        "prune",
        "recalibrate",
        "report",
        "save",
        "save_checkpoint",
        "set_masks",
    ]
    values = ["Budget", "CompactModule", "GroupLearner", "PrepareConfig", "PreparedModule"]
    values += ["CostModel", "FEWEST_WEIGHTS"]
    reports = ["PruneReport", "Report"]
    errors = [name for name in dir(dspfx.errors) if name.endswith("Error")]
    assert sorted(dspfx.__all__) == sorted(verbs + values + reports + errors)
    for name in dspfx.__all__:
        assert getattr(dspfx, name).__doc__
    for name in errors:
        assert issubclass(getattr(dspfx, name), dspfx.DspfxError)
