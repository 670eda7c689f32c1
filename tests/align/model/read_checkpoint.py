"""Run by a Python with another transformers: MODEL ADAPTER EXPECTED. Fails unless all of it is read as it was written."""

import sys

import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

directory, adapter, expected = sys.argv[1:]
wanted = torch.load(expected)
model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
assert not any(report.values()), report
ids = torch.linspace(0, model.config.vocab_size - 1, 32).long()[None]
with torch.no_grad():
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, wanted["model"], atol=1e-5, rtol=1e-5)
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, wanted["adapted"], atol=1e-5, rtol=1e-5)
tokenizer = AutoTokenizer.from_pretrained(directory)
assert tokenizer("<|im_start|>a", add_special_tokens=False)["input_ids"][0] == 912
assert tokenizer.decode(tokenizer("What is 17 + 25?")["input_ids"], skip_special_tokens=True) == "What is 17 + 25?"
assert tokenizer.chat_template
print("transformers", transformers.__version__)
