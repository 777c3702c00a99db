"""From files to batches on the devices.

Read datasets.py first: a data set is decoded images and labels. Images come from TFDS (tfds_images.py) or from folders
(folder_images.py). decoding.py decodes them, and decoded_images.py keeps them in memory or on disk. batches.py shuffles
them and sends each device its share. Imports only `config` and `runtime`.
"""
