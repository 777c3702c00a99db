"""From files to batches on the devices.

Read datasets.py first: a data set is decoded images and labels. Images come from TFDS (tfds_images.py) or from folders
(folder_images.py); image_files.py says which files count as images. decoding.py decodes them, tiff.py knows what PIL
misreads, and decoded_images.py keeps them in memory or on disk. batches.py shuffles them and sends each device its
share. Imports only `config` and `runtime`.
"""
