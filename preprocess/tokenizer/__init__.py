"""The embedded tokenizer: two files that `AutoTokenizer` loads, and the script that makes them."""
