"""The prompt that TranslateGemma was trained on: one text, and the two languages by their codes.

The codes reach the template as `source_lang_code` and `target_lang_code` (ISO 639, with a region or without). A
language that is not listed is called by its code.
"""

from __future__ import annotations

import json

LANGUAGES = {
    "ar": "Arabic",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "ca": "Catalan",
    "cs": "Czech",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "fa": "Persian",
    "fi": "Finnish",
    "fil": "Filipino",
    "fr": "French",
    "gu": "Gujarati",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "id": "Indonesian",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "kn": "Kannada",
    "ko": "Korean",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "ml": "Malayalam",
    "mr": "Marathi",
    "ms": "Malay",
    "nl": "Dutch",
    "no": "Norwegian",
    "pa": "Punjabi",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sr": "Serbian",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "th": "Thai",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "vi": "Vietnamese",
    "zh": "Chinese",
    "zu": "Zulu",
}

#: Jinja, like every other template. Only a user's text has a place in it.
TRANSLATION = (
    "{% set names = " + json.dumps(LANGUAGES) + " %}"
    "{% if not source_lang_code or not target_lang_code %}"
    "{{ raise_exception('source_lang_code and target_lang_code are needed') }}{% endif %}"
    "{% set source, target = source_lang_code | replace('_', '-'), target_lang_code | replace('_', '-') %}"
    "{% set from = names.get(source.split('-')[0] | lower, source) %}"
    "{% set to = names.get(target.split('-')[0] | lower, target) %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<start_of_turn>user\\n'"
    " + 'You are a professional ' + from + ' (' + source + ') to ' + to + ' (' + target + ') translator. Your goal is"
    " to accurately convey the meaning and nuances of the original ' + from + ' text while adhering to ' + to +"
    " ' grammar, vocabulary, and cultural sensitivities.\\nProduce only the ' + to + ' translation, without any"
    " additional explanations or commentary. Please translate the following ' + from + ' text into ' + to +"
    " ':\\n\\n\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
