"""Settings of a run of four tasks that takes a second or two."""

ALL = "detection,segmentation,keypoint,captioning"
TINY = [
    "steps=4", "batch_size=4", "checkpoint_every=2", "keep_checkpoints=10", "log_every=1", "num_workers=0", "lr=1e-3",
    "eval_batch_size=4", "schedule.warmup_steps=2", "model.image_size=[32,48]", "model.encoder.name=vit",
    "model.encoder.dim=32", "model.encoder.num_layers=1", "model.encoder.num_heads=2", "model.encoder.mlp_dim=64",
    "model.decoder.dim=32", "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=64",
    "model.decoder.max_seq_len=64", "model.vocab.num_bins=32", "model.vocab.text_base=1040", "model.vocab.size=1040",
    "detection.max_objects=10", "detection.noise_objects=2", "segmentation.max_points=16", "segmentation.num_samples=2",
    "captioning.max_tokens=30", "segmentation.batch_size=2", "segmentation.loss_weight=0.5",
]  # fmt: skip
