"""Scores: COCO average precision, F1 and confusion, caption scores, and how far scores are probabilities."""
