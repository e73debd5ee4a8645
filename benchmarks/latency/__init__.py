"""How fast pruned networks are, each in its fastest engine, against all that a user could run.

    python -m benchmarks.latency run [--only PATTERN] [--batch 1] [--precision fp32] [--keep 0.5]
    python -m benchmarks.latency tables     # docs/latency.md

A case is a network, a batch, a precision, and how many of the MACs are kept. In it are timed, in
one process, each in the engine that `dspfx.compile` finds to be its fastest:

- dense: the whole network;
- channel-pruned: by Torch-Pruning's magnitude pruner, in multiples of 8, to the same MACs;
- channels: whole channels by `dspfx.prune_channels`;
- groups: two clustered groups for each layer, by `dspfx.prune`, the worst case of groups, or what
  the authors' masks say.

Every case is a line of benchmarks/results/latency.jsonl when it is done; `run` goes on with those
that are not there. It needs `pip install torch-pruning segmentation-models-pytorch`.
"""
