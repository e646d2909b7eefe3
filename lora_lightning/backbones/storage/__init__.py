"""How the weights of a base are stored: bitsandbytes, GGUF, and samples of the values before quantization."""
