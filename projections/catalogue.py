"""All read models. A new one is a file here and a name in this tuple."""

from typing import Final

from projections.order_list import ORDER_LIST
from projections.order_view import ORDER_VIEW
from projections.read_model import ReadModel
from projections.stock_availability import STOCK_AVAILABILITY

READ_MODELS: Final[tuple[ReadModel, ...]] = (ORDER_VIEW, ORDER_LIST, STOCK_AVAILABILITY)
