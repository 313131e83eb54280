# tinyshakespeare, 1.1 MB, by characters (nanoGPT's first tutorial)
base = "shakespeare"
tokenizer = "char"
