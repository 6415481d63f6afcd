"""Traces for the cold start of ExpLang: who is asked, what is kept of the replies, and in which form."""
