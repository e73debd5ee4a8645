"""Accuracy of pruned networks at equal multiply-accumulates and equal training, against peers.

    python -m benchmarks.accuracy run        # whatever is still missing; stop it whenever you like
    python -m benchmarks.accuracy latency    # of what was trained; wants a quiet machine
    python -m benchmarks.accuracy tables     # docs/accuracy.md and its pictures

Fashion-MNIST-20k and CIFAR ResNet-20, as `protocol.py` says. One result is one line in
`benchmarks/results/accuracy.jsonl`.
"""
