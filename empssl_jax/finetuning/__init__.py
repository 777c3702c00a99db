"""Fine-tunes a trained encoder on labelled images, of which a few can be enough.

finetune.py is the command: it divides the images, runs the epochs, measures and writes. supervised_step.py has the
compiled step. Imports `inference` and what is below it.
"""
