# Shakespeare's 38 plays, 4.8 MB, by characters; they come with a package
base = "plays"
tokenizer = "char"
