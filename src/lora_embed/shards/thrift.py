"""Thrift's compact protocol, in which Parquet describes its contents: bytes → numbers, bytes, lists and structs."""

from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


class Thrift:
    """A reader of Thrift's compact protocol, from a position in some bytes on."""

    def __init__(self, data: bytes | memoryview, place: int) -> None:
        self._data, self.place = data, place

    def struct(self) -> dict[int, Any]:
        """A struct: field number → number, bytes, list or struct; true and false are ignored."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._number()
            if head & 15 not in (_TRUE, _FALSE):
                fields[number] = self._value(head & 15)
        return fields

    def binary(self) -> bytes:
        """The value of the next field, which must be of type binary."""
        if self._byte() & 15 != _BINARY:
            raise ValueError("another type where text was expected")
        return self._take(self._varint())

    def _value(self, kind: int) -> Any:
        if 3 < kind < _DOUBLE:
            return self._number()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._element(head & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [(self._element(kinds >> 4), self._element(kinds & 15)) for _ in range(count)]
        if kind not in (_BYTE, _DOUBLE):
            raise ValueError(f"a field of type {kind}, which Thrift does not know")
        return self._take(1 if kind == _BYTE else 8)

    def _element(self, kind: int) -> Any:
        return self._byte() if kind in (_TRUE, _FALSE) else self._value(kind)  # in a list, true and false take a byte

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self.place:
            raise ValueError(f"a value of {length} bytes where fewer are left")
        self.place += length
        return bytes(self._data[self.place - length : self.place])

    def _byte(self) -> int:
        byte = self._data[self.place]
        self.place += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)
