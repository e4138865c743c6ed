"""Phrasings of questions. The label is quoted as printed most of the time, as users copy what they see."""

FIELD = (
    "What is the {0}?", "What is the value of {0}?", "What does {0} say?", "Find {0}.", "{0}?", "Read the {0}.",
    "Which value stands next to {0}?", "What is written for {0}?", "Give the {0}.",
)  # fmt: skip
PRICE = (
    "What is the price of {0}?", "How much is {0}?", "What does {0} cost?", "Price of {0}?",
    "How much was paid for {0}?",
)  # fmt: skip
ITEM = ("Which item costs {0}?", "What was bought for {0}?", "Which line has the amount {0}?")
COMPANY = (
    "Which company issued the receipt?", "What is the name of the shop?", "Who issued this receipt?",
    "What is written at the top?",
)  # fmt: skip
RECEIPT = {
    "company": (*COMPANY[:3], "Which shop is this receipt from?", "Find the company.", "Company?"),
    "date": ("When was the receipt issued?", "Which date is on the receipt?", "Find the date.", "Date of the receipt?"),
    "address": ("Where is the shop?", "What is the address of the company?", "Find the address.", "Read the address."),
    "total": (
        "How much is the total?", "What is the total amount?", "How much was to be paid?", "Find the total.", "Total?",
    ),
}  # fmt: skip
"""What each whole receipt is asked for, beside `What is the company?` and so on."""
AMOUNT = ("What is the amount for {0}?", "What do all {0} cost together?", "How much was charged for {0}?")
UNIT_PRICE = ("What is the unit price of {0}?", "How much is one {0}?", "What does a single {0} cost?")
QUANTITY = ("How many {0} were bought?", "What is the quantity of {0}?")
KEY = ("Which label has the value {0}?", "What does {0} belong to?", "Which field says {0}?")
TITLE = ("What is the title?", "What is the heading?", "What is written at the top?")
CELL = (
    "What is the {0} of {1}?", "What is {0} for {1}?", "{1}: what is the {0}?", "Which {0} does {1} have?",
    "Find {0} in row {1}.",
)  # fmt: skip
ROW = ("Which {0} has {1} {2}?", "Which row has {2} under {1}?", "In which row is {1} {2}?")
BAR = (
    "What is the value of {0}?", "How large is {0}?", "What number does the bar {0} show?", "{0}?",
    "What is the value for {0}?",
)  # fmt: skip
BAR_OF = ("Which bar has the value {0}?", "What shows {0}?", "Which label has {0}?")
LARGEST = ("Which bar is the longest?", "What has the largest value?", "Which is the highest?")
SMALLEST = ("Which bar is the shortest?", "What has the smallest value?", "Which is the lowest?")
TRANSCRIBE = ("Read all text.", "Transcribe the page.", "What text is on the page?", "Write down all lines.")
