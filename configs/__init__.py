"""Settings of the recipes, one YAML file each; installed as data of `pix2seq.configs`."""
