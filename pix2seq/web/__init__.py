"""The web page and the HTTP endpoint of `pix2seq serve`."""
