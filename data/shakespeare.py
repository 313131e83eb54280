# tinyshakespeare, 1.1 MB, in GPT-2's tokens (nanoGPT's fine-tuning tutorial)
# It is downloaded, or read from data/tinyshakespeare/input.txt if you put it there.
text = "tinyshakespeare"
url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
hint = "without a network: python prepare.py plays_char"

tokenizer = "gpt2"
val_fraction = 0.1
