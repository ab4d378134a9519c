"""Data set formats: readers of COCO and Pascal VOC, reader and writer of shards."""
