"""Token ids of conversations for the stages: `reward.chat` with the errors that the command line shows."""

from align.errors import reward_errors
from reward import chat

encode_prompt = reward_errors()(chat.encode_prompt)
encode_conversation = reward_errors()(chat.encode_conversation)
encode_example = reward_errors()(chat.encode_example)
answer_text = reward_errors()(chat.answer_text)
decode_completion = chat.decode_completion
