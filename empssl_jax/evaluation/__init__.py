"""Measures how good an encoder is: embeddings, their effective rank, weighted kNN, linear classifiers.

Start with evaluate.py, which measures one run on the images that measured_images.py finds. embeddings.py computes
embeddings, embedding_files.py stores them, and run_embeddings.py does whichever is needed. knn.py, whitening.py,
linear.py and logistic.py measure them with the labels that few_labels.py chooses, by the top-1 and top-5 accuracy of
accuracy.py; effective_rank.py needs no labels. comparison.py compares runs. online_probe.py measures during training,
untrained_baseline.py before it. trained_encoder.py restores the encoder of a run.

Imports only `method`, `data`, `run_folder`, `runtime` and `config`.
"""
