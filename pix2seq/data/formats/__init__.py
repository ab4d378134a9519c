"""Readers and writers of data set formats: COCO, Pascal VOC and shards."""
