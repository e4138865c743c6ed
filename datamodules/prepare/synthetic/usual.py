"""Usual words of whole pages: labels, titles, closing lines, and the words around names in companies and addresses.

Pages of both splits show them. The amounts of a receipt differ by their labels only, so a held-out receipt without
TOTAL, SUBTOTAL or CASH would ask for what it does not show, and could not measure what a model has learned. A label is
no answer, so nothing leaks: names and values, which are the answers, obey `lexicon.belongs` on whole pages too.
In labels, ``{tax}`` is the name of the tax, ``{rate}`` its percentage, and ``{currency}`` RM or the like.
"""

from collections.abc import Sequence

from .lexicon import prints

TAXES = ("GST", "GST", "GST", "SST", "VAT", "Tax")
RATES = (6, 6, 6, 5, 7, 8, 9, 10)
CURRENCIES = ("RM", "RM", "MYR", "$", "SGD", "EUR", "USD", "GBP")
TITLES = (
    "Tax Invoice", "Tax Invoice", "Tax Invoice", "Receipt", "Simplified Tax Invoice", "Invoice", "Cash Receipt",
    "Cash Bill", "Official Receipt", "Sales Receipt", "Guest Check", "Cash Sales", "Bill", "Tax Invoice / Receipt",
)  # fmt: skip
FIRMS = (
    "Sdn Bhd", "Sdn Bhd", "Sdn. Bhd.", "(M) Sdn Bhd", "(KL) Sdn Bhd", "Bhd", "Ltd", "Pte Ltd", "Inc.", "LLC", "GmbH",
    "& Co.", "& Sons", "Enterprise", "Trading", "Group",
)  # fmt: skip
SHOPS = (
    "Restaurant", "Restoran", "Cafe", "Bakery", "Hardware", "Pharmacy", "Stationery", "Mini Market", "Supermarket",
    "Book Store", "Electrical", "Trading", "Mart", "Kitchen", "Coffee House", "Motor", "Bookshop", "Clinic",
)  # fmt: skip
STREETS = ("Jalan", "Jln", "Jalan", "Lorong", "Persiaran")
ROADS = ("Street", "Road", "Avenue", "Lane", "Drive", "St.", "Rd.", "Ave")
AREAS = (
    "Taman", "Bandar", "Kampung", "Seksyen", "Plaza", "Kawasan Perindustrian", "Off Jalan", "Pusat", "Medan", "Desa",
)  # fmt: skip
PLACES = (
    "No. {0},", "No {0},", "No.{0}", "Lot {0},", "Lot {0}", "{0},", "Block {0},", "Unit {0},", "Ground Floor, {0},",
)  # fmt: skip
STATES = ("Darul Ehsan", "Malaysia", "Singapore")
DATES = (
    "Date", "Date", "Date", "Invoice Date", "Bill Date", "Receipt Date", "Date/Time", "Sales Date", "Trx Date", "Dated",
)  # fmt: skip
OTHER_DATES = ("Due Date", "Delivery Date", "Valid Until", "Expiry", "Printed", "Member Since", "Next Visit", "Closed")
TOTALS = (
    "Total", "Total", "Total", "Total", "Total {currency}", "Total ({currency})", "Grand Total", "Grand Total",
    "Net Total", "Nett Total", "Total Amount", "Total Due", "Amount Due", "Total Payable", "Amount Payable",
    "Total Amt Payable", "Balance Due", "To Pay", "Total (Incl. {tax})", "Total Incl. {tax}", "Bill Total",
    "Total Incl. {tax} @{rate}%", "Total Sales (Inclusive of {tax})", "Total Inclusive {tax}", "Total Incl of {tax}",
    "Total {currency} Incl. of {tax}", "Total Sales Incl {tax}", "Total (Inclusive of {tax})", "Total After {tax}",
)  # fmt: skip
ROUNDED_TOTALS = (
    "Total", "Net Total", "Grand Total", "Total Rounded", "Total After Rounding", "Rounded Total", "Amount Due",
    "Total Payable", "Total Amt Rounded",
)  # fmt: skip
GROSS = ("Total Sales", "Total Sales (Inclusive of {tax})", "Total Incl. {tax}", "Total Before Rounding", "Total Amt")
NETS = (
    "Total Sales (Excluding {tax})", "Total Excl. {tax}", "Total (Excluding {tax})", "Amount Before {tax}",
    "Net Amount", "Total Before Tax", "Taxable Amount", "Total Excl {tax}", "Sub Total (Excl. {tax})",
)  # fmt: skip
SUBTOTALS = ("Subtotal", "Sub Total", "Sub-Total", "Sub Total", "Total Goods", "Gross Amount", "Item Total")
DISCOUNTS = ("Discount", "Less Discount", "Member Discount", "Disc", "Total Savings", "Voucher")
TAX_LABELS = (
    "{tax} {rate}%", "{tax} @{rate}%", "Total {tax}", "{tax}", "{tax} ({rate}%)", "Add {tax} {rate}%", "{tax} Amount",
)  # fmt: skip
ROUNDINGS = ("Rounding", "Rounding Adj", "Rounding Adjustment", "Round Adj", "Rounding {currency}")
COUNTS = ("Total Qty", "No. of Items", "Item Count", "Total Items", "Qty", "Total Quantity")
CASH = (
    "Cash", "Cash", "Cash", "Cash {currency}", "Cash Received", "Cash Tendered", "Paid", "Payment", "Tender",
    "Paid Amount",
)  # fmt: skip
CARDS = ("Visa", "Master", "Credit Card", "Card", "Visa Card", "Debit Card", "Bank Card")
CHANGES = ("Change", "Change", "Change", "Change Due", "Cash Change", "Change {currency}", "Change Amt", "Balance")
SUMMARIES = ("{tax} Summary", "{tax} Summary", "Tax Summary", "{tax} Analysis")
SUMMARY_HEADS = (
    ("Tax Code", "Amt({currency})", "Tax({currency})"), ("{tax} Summary", "Amount({currency})", "{tax}({currency})"),
    ("Code", "Amount", "Tax"), ("{tax} Code", "Net Amt", "{tax} Amt"), ("Tax Code", "Taxable", "Tax"),
)  # fmt: skip
TAX_CODES = ("SR", "S", "SR", "T", "Z", "ZR", "ZRL")
COLUMNS = {
    "desc": ("Description", "Item", "Desc", "Item Description", "Product", "Menu"),
    "code": ("Item", "Code", "Item Code", "No"),
    "qty": ("Qty", "Qty", "Quantity", "Q"),
    "price": ("Price", "U.Price", "Unit Price", "S/Price", "U/P", "@"),
    "amount": ("Amount", "Amt", "Total", "Amt({currency})", "{currency}", "Price({currency})"),
    "tax": ("Tax", "Code"),
}
CLOSINGS = (
    "Thank You", "Thank You", "Thank You. Please Come Again", "Please Come Again", "Thank You For Shopping With Us",
    "Goods Sold Are Not Returnable", "Goods sold are not returnable or refundable", "Have a nice day", "See You Again",
    "*** Thank You ***", "Thank you & come again!", "Please keep this receipt", "Strictly no cash refund",
    "No exchange without receipt", "Exchange within 7 days with receipt", "This is a computer generated receipt",
    "No signature required", "All prices inclusive of {tax}", "Customer Copy", "Find us on Facebook", "E. & O.E.",
    "Like and follow us", "Price inclusive of {tax}", "Goods sold are not refundable, Thank You",
    "Keep the invoice for applicable returns", "Please verify your receipt before leaving the counter",
)  # fmt: skip
OTHERS = (
    "Tel Fax Phone H/P Email Website Co. Reg. No Company Reg No GST ID GST Reg No GST No Tax ID VAT No SST ID ROC "
    "Invoice No Receipt No Bill No Doc No Order No Trx No Ref Cashier Operator Staff Server Salesperson Counter Table "
    "Pax Time Terminal Till POS Customer Member Bill To Page Branch Owned by INV Qty RM pcs kg ml Date "
    "Exchange before AM PM Lot Block Unit Ground Floor ID Account Code"
)  # fmt: skip
MONTHS = "January February March April May June July August September October November December".split()
# What a month's name and a day are made of; a date is kept apart by its letters and digits all together.
_DATE_PARTS = [*MONTHS, *(month[:3] for month in MONTHS), *(f"{day:02d}" for day in range(1, 32))]
_YEARS = [str(year) for year in range(1990, 2040)]
SMALL_AMOUNTS = ("0.00", "0.01", "0.02", "0.03", "0.04", "-0.01", "-0.02", "-0.03", "-0.04")
"""Roundings, and the change of who pays the exact sum: no answers, but what most receipts show."""


def fill(label: str, *, tax: str = "", rate: int = 0, currency: str = "") -> str:
    """Return a label for a tax and a currency."""
    return label.format(tax=tax, rate=rate, currency=currency)


def _usual() -> frozenset[str]:
    labels: list[Sequence[str]] = [
        TITLES,
        FIRMS,
        SHOPS,
        STREETS,
        ROADS,
        AREAS,
        STATES,
        DATES,
        OTHER_DATES,
        TOTALS,
        ROUNDED_TOTALS,
    ]
    labels += [GROSS, NETS, SUBTOTALS, DISCOUNTS, TAX_LABELS, ROUNDINGS, COUNTS, CASH, CARDS, CHANGES, SUMMARIES]
    labels += [*SUMMARY_HEADS, *COLUMNS.values(), CLOSINGS, TAX_CODES, [*OTHERS.split(), *_DATE_PARTS, *_YEARS]]
    found = {print_ for group in labels for label in group for print_ in _label_prints(label)}
    signs = [currency + amount for currency in ("", *CURRENCIES) for amount in SMALL_AMOUNTS]
    return frozenset(found.union(*map(prints, (*signs, *CURRENCIES, *TAXES, "10%", "@10%", "(10%)"))))


def _label_prints(label: str) -> set[str]:
    return {
        print_
        for tax in TAXES
        for currency in CURRENCIES
        for print_ in prints(fill(label, tax=tax, rate=10, currency=currency))
    }


USUAL = _usual()
"""`lexicon.prints` of all of these."""
