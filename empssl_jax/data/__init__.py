"""From files to batches on the devices.

Read datasets.py first: a data set is decoded images and labels. They come from TFDS (tfds_images.py) or from folders
(folder_images.py), are decoded by decoding.py and kept in memory or on disk by decoded_images.py. batches.py shuffles
them and sends each device its share. Imports only `config` and `runtime`.
"""
