"""Conversations that outlive the engine process which evaluated them: files that hold a sequence's tokens and state.

`entry` is the format of one file, `folder` a bounded set of them that several processes use at once, `store` what an
engine finds and saves, `places` where a node keeps them. Nothing here knows of an engine: a state is bytes.
"""
