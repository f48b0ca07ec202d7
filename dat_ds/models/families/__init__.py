"""Where networks come from, and what each library's need to be trained here."""
