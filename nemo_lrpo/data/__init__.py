"""From files of questions to token ids: reader, sampler, language tags, tokenisation, collation."""
