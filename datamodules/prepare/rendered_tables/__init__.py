"""Tables of WikiTableQuestions and TabFact, rendered as pages."""
