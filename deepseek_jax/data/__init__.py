"""Text in, batches of token ids out; a batch is a pure function of (seed, sample number).

corpus      the files that a source names, and their documents
rows        a row of a file as a document: its text, or its conversation
readers     one reader per file type: .txt .py .md .jsonl .json .parquet .array_record
compression the same behind .gz or .zst
tokenizer   bytes, any tokenizer.json, or DeepSeek's own
tokenise    documents to ids, on every core
store       a corpus tokenised once, kept in the cache directory
once        one process builds it, the others wait
watch       progress of long work, for callers that show it
holdout     which documents, or ends of documents, are held out for evaluation
noise       the counter-based random numbers behind every choice below
fim         prefix-suffix-middle documents (V3 section 4.1)
packing     documents concatenated and cut into windows: which tokens make sample n of epoch e
pipeline    grain: open_split(...).rows(start, count), and prefetching
messages    the messages of a conversation, checked and in order
chat        prompts of every generation, and a model's text back to a message

conversations         which tokens of a conversation are learnt, in which context
conversation_packing  whole conversations side by side in windows
marked_text           text in which special tokens are spelled out

Nothing here depends on a model, and the only state is the number of the next sample.
"""
