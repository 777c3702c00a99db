"""How good an encoder is: embeddings, weighted kNN, a linear classifier.

Read evaluate.py first; it measures one run. embeddings.py makes the embeddings, knn.py, whitening.py and linear.py
measure them, comparison.py compares runs. online_probe.py measures during training, untrained_baseline.py before it.
May import `method`, `data`, `run_folder`, `runtime` and `config`.
"""
