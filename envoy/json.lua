-- Reads a request's body: strict JSON (RFC 8259 in UTF-8), with the names and types of the contract.
--
-- One pass over the bytes. Positions count from 0; a string of Lua ends with a zero byte, which no JSON contains, so that
-- reading one byte past the text is safe.
local ffi = require("ffi")

-- A value that goes to the transcoder as google.protobuf.Value takes up to three levels of messages for each of its own,
-- of which protobuf reads 100.
local LEVELS = 32
-- JSON that is sent on as text.
local TEXT_LEVELS = 100

local UNREADABLE = "We could not parse the JSON body of your request:"

local text, bytes, size -- the body that is being read
local messages -- the contract's, by name
local result

local function table_of(kinds)
  local made = ffi.new("uint8_t[256]")
  for kind, characters in pairs(kinds) do
    for character in characters:gmatch(".") do
      made[character:byte()] = kind
    end
  end
  return made
end

-- What a byte is within a string; 0 is any other.
local QUOTE, ESCAPE, CONTROL, HIGH = 1, 2, 3, 4
local in_string = table_of({ [QUOTE] = '"', [ESCAPE] = "\\" })
ffi.fill(in_string, 32, CONTROL)
ffi.fill(in_string + 128, 128, HIGH)

-- What a byte is between and at the beginning of values; 0 is any other: of true, false and null, or of no JSON.
local SPACE, DIGIT, MINUS, STRING, ARRAY, OBJECT = 1, 2, 3, 4, 5, 6
local outside = table_of({
  [SPACE] = " \t\r\n",
  [DIGIT] = "0123456789",
  [MINUS] = "-",
  [STRING] = '"',
  [ARRAY] = "[",
  [OBJECT] = "{",
})

-- The value of a hexadecimal digit, and one.
local hexadecimal = ffi.new("uint8_t[256]")
for digit = 0, 15 do
  hexadecimal[("0123456789abcdef"):byte(digit + 1)] = digit + 1
  hexadecimal[("0123456789ABCDEF"):byte(digit + 1)] = digit + 1
end

local escapes = table_of({ [1] = '"\\/bfnrt' })
local UNESCAPED = { b = "\b", f = "\f", n = "\n", r = "\r", t = "\t" }

-- Lines and columns count from 1, columns in characters.
local function place(at)
  local line, column = 1, 1
  for before = 0, at - 1 do
    if bytes[before] == 0x0a then
      line, column = line + 1, 1
    elseif bytes[before] < 0x80 or bytes[before] > 0xbf then
      column = column + 1
    end
  end
  return string.format("at line %d, column %d", line, column)
end

-- A caller's text as a message may repeat it: at most 64 bytes, whole characters, none of them a control character.
local function shown(given)
  if #given > 64 then
    given = given:sub(1, 64):gsub("[\192-\247]?[\128-\191]*$", "") .. "..."
  end
  return (given:gsub("[%c\127]", function(character)
    return string.format("\\x%02x", character:byte())
  end))
end

local function fail(at, problem)
  error({ message = string.format("%s %s %s.", UNREADABLE, problem, place(at)), unreadable = true }, 0)
end

local character_end

local function expected(at, what)
  local found = "the end"
  if at < size then
    local whole, stop = true, at + 1
    if bytes[at] >= 0x80 then
      whole, stop = pcall(character_end, at)
    end
    found = whole and "'" .. shown(text:sub(at + 1, stop)) .. "'" or "invalid UTF-8"
  end
  fail(at, string.format("expected %s, but found %s", what, found))
end

local function refuse(message, param, code)
  result.fault = result.fault or { message = message, param = param, code = code }
end

local function space_end(at)
  while outside[bytes[at]] == SPACE do
    at = at + 1
  end
  return at
end

-- Four hexadecimal digits as a number.
local function code_unit(at)
  local unit = 0
  for digit = at, at + 3 do
    local value = hexadecimal[bytes[digit]]
    if value == 0 then
      expected(digit, "a hexadecimal digit")
    end
    unit = unit * 16 + value - 1
  end
  return unit
end

local function escape_end(at)
  local character = bytes[at + 1]
  if escapes[character] == 1 then
    return at + 2
  end
  if character ~= 0x75 then -- u
    expected(at + 1, 'one of "\\/bfnrtu after a backslash')
  end
  local unit = code_unit(at + 2)
  if unit < 0xd800 or unit > 0xdfff then
    return at + 6
  end
  if unit < 0xdc00 and bytes[at + 6] == 0x5c and bytes[at + 7] == 0x75 then
    local low = code_unit(at + 8)
    if low >= 0xdc00 and low <= 0xdfff then
      return at + 12
    end
  end
  fail(at, "half of a surrogate pair")
end

-- Checks one character of UTF-8 that is not ASCII: no overlong forms, no surrogates, nothing above U+10FFFF.
function character_end(at)
  local first, second = bytes[at], bytes[at + 1]
  local low, high, last = 0x80, 0xbf, at + 1
  if first >= 0xc2 and first <= 0xdf then
    last = at + 1
  elseif first >= 0xe0 and first <= 0xef then
    last = at + 2
    low = first == 0xe0 and 0xa0 or low
    high = first == 0xed and 0x9f or high
  elseif first >= 0xf0 and first <= 0xf4 then
    last = at + 3
    low = first == 0xf0 and 0x90 or low
    high = first == 0xf4 and 0x8f or high
  else
    fail(at, "invalid UTF-8")
  end
  if second < low or second > high then
    fail(at, "invalid UTF-8")
  end
  for following = at + 2, last do
    if bytes[following] < 0x80 or bytes[following] > 0xbf then
      fail(at, "invalid UTF-8")
    end
  end
  return last + 1
end

-- From behind a string's first quote to its last.
local function string_end(at)
  while true do
    local kind = in_string[bytes[at]]
    while kind == 0 do
      at = at + 1
      kind = in_string[bytes[at]]
    end
    if kind == QUOTE then
      return at
    elseif kind == ESCAPE then
      at = escape_end(at)
    elseif kind == HIGH then
      at = character_end(at)
    elseif at >= size then
      expected(at, "a closing quote")
    else
      fail(at, "a control character that is not escaped")
    end
  end
end

local function digits_end(at)
  if outside[bytes[at]] ~= DIGIT then
    expected(at, "a digit")
  end
  repeat
    at = at + 1
  until outside[bytes[at]] ~= DIGIT
  return at
end

-- Also whether the number is written as an integer, without fraction and exponent.
local function number_end(at)
  if bytes[at] == 0x2d then
    at = at + 1
  end
  if bytes[at] == 0x30 then
    at = at + 1
    if outside[bytes[at]] == DIGIT then
      fail(at - 1, "a number with a leading zero")
    end
  else
    at = digits_end(at)
  end
  local byte, plain = bytes[at], true
  if byte == 0x2e then
    at, plain = digits_end(at + 1), false
    byte = bytes[at]
  end
  if byte == 0x65 or byte == 0x45 then
    byte = bytes[at + 1]
    at, plain = digits_end((byte == 0x2b or byte == 0x2d) and at + 2 or at + 1), false
  end
  return at, plain
end

-- As number_end, for a number of no field's own.
local function double_end(at)
  local stop, plain = number_end(at)
  if (not plain or stop - at > 300) and result.doubles then
    local literal = text:sub(at + 1, stop)
    if math.abs(tonumber(literal)) == math.huge then
      local message = string.format("Invalid '%s': the number %s is too large.", result.doubles, shown(literal))
      refuse(message, result.doubles, "invalid_value")
    end
  end
  return stop
end

local LITERALS = { [0x74] = "true", [0x66] = "false", [0x6e] = "null" }

local function literal_end(at)
  local literal = LITERALS[bytes[at]]
  if not literal or text:sub(at + 1, at + #literal) ~= literal then
    expected(at, "a value")
  end
  return at + #literal
end

-- A string without its escapes, given without its quotes.
local function unescaped(raw)
  if not raw:find("\\", 1, true) then
    return raw
  end
  local high
  return (
    raw:gsub("\\(.)(%x?%x?%x?%x?)", function(kind, rest)
      if kind ~= "u" then
        return (UNESCAPED[kind] or kind) .. rest
      end
      local code = tonumber(rest, 16)
      if code >= 0xd800 and code < 0xdc00 then
        high = code
        return ""
      elseif code >= 0xdc00 and code < 0xe000 then
        code = 0x10000 + (high - 0xd800) * 0x400 + code - 0xdc00
      end
      if code < 0x80 then
        return string.char(code)
      end
      local tail, first = "", 0xc0
      local room = 0x20
      repeat
        tail = string.char(0x80 + code % 0x40) .. tail
        code = math.floor(code / 0x40)
        if code >= room then
          room, first = room / 2, first + room
        end
      until code < room
      return string.char(first + code) .. tail
    end)
  )
end

-- Reads a key and its colon: where its value begins, and the key. Keys are compared without escapes.
local function key_end(at, seen, prefix)
  if bytes[at] ~= 0x22 then
    expected(at, "a key in double quotes")
  end
  local closing = string_end(at + 1)
  local key = unescaped(text:sub(at + 2, closing))
  if seen[key] then
    local message = string.format("%s the key '%s' is given twice, again %s.", UNREADABLE, shown(key), place(at))
    error({ message = message, param = prefix .. shown(key), unreadable = true }, 0)
  end
  seen[key] = true
  at = space_end(closing + 1)
  if bytes[at] ~= 0x3a then
    expected(at, "a colon")
  end
  return space_end(at + 1), key
end

-- Calls `member(key, at)` with the place of each value of an object; it returns where the value ends.
local function members(at, prefix, member)
  at = space_end(at + 1)
  if bytes[at] == 0x7d then
    return at + 1
  end
  local seen, key = {}, nil
  while true do
    at, key = key_end(at, seen, prefix)
    at = space_end(member(key, at))
    if bytes[at] == 0x7d then
      return at + 1
    elseif bytes[at] ~= 0x2c then
      expected(at, "a comma or }")
    end
    at = space_end(at + 1)
  end
end

-- Calls `item(at, index)` with the place of each value of an array; it returns where the value ends. Indices count from 0.
local function items(at, item)
  at = space_end(at + 1)
  if bytes[at] == 0x5d then
    return at + 1, 0
  end
  local count = 0
  while true do
    at = space_end(item(at, count))
    count = count + 1
    if bytes[at] == 0x5d then
      return at + 1, count
    elseif bytes[at] ~= 0x2c then
      expected(at, "a comma or ]")
    end
    at = space_end(at + 1)
  end
end

-- The arrays and objects around a place, from the outermost: their kinds, and the keys that the objects have had.
local around, keys = ffi.new("uint8_t[?]", TEXT_LEVELS + 1), {}
local CLOSING = ffi.new("uint8_t[8]")
CLOSING[ARRAY], CLOSING[OBJECT] = 0x5d, 0x7d

-- The end of a value of any type. One loop for all of it, so that LuaJIT compiles it.
local function skip(at, levels)
  local depth = 0
  while true do
    local kind, ended = outside[bytes[at]], true
    if kind == DIGIT or kind == MINUS then
      at = double_end(at)
    elseif kind == STRING then
      at = string_end(at + 1) + 1
    elseif kind == ARRAY or kind == OBJECT then
      if depth == levels then
        fail(at, string.format("arrays and objects more than %d deep", levels))
      end
      depth = depth + 1
      around[depth] = kind
      at = space_end(at + 1)
      if bytes[at] == CLOSING[kind] then
        at, depth = at + 1, depth - 1
      else
        ended = false
        if kind == OBJECT then
          keys[depth] = {}
          at = key_end(at, keys[depth], "")
        end
      end
    else
      at = literal_end(at)
    end
    while ended do
      if depth == 0 then
        return at
      end
      at = space_end(at)
      local byte = bytes[at]
      if byte == 0x2c then
        at, ended = space_end(at + 1), false
        if around[depth] == OBJECT then
          at = key_end(at, keys[depth], "")
        end
      elseif byte == CLOSING[around[depth]] then
        at, depth = at + 1, depth - 1
      else
        expected(at, "a comma or " .. string.char(CLOSING[around[depth]]))
      end
    end
  end
end

local TYPES = { [DIGIT] = "number", [MINUS] = "number", [STRING] = "string", [ARRAY] = "array", [OBJECT] = "object" }
local EXPECTED = {
  string = "a string",
  enum = "a string",
  boolean = "a boolean",
  integer = "an integer",
  number = "a decimal",
  object = "an object",
  json = "an object",
}
local GIVEN = { string = "a string", boolean = "a boolean", array = "an array", object = "an object", null = "null" }

-- The JSON type of the value at a place.
local function type_at(at)
  return TYPES[outside[bytes[at]]] or (bytes[at] == 0x6e and "null" or "boolean")
end

local function wrong_type(path, what, at, stop)
  local given = GIVEN[type_at(at)]
  if not given then
    local _, plain = number_end(at)
    given = plain and "an integer" or "a decimal number"
  end
  refuse(string.format("Invalid type for '%s': expected %s, but got %s instead.", path, what, given), path, "invalid_type")
  return stop
end

-- The bound is the field's own, if it has one, or else the type's.
local function out_of_range(path, kind, field, sign, bound, at, stop)
  local high = sign == "<="
  if not high and field.above then
    sign, bound = ">", field.above
  else
    bound = field[high and "max" or "min"] or bound
  end
  local message = "Invalid '%s': %s %s value. Expected a value %s %s, but got %s instead."
  local side = high and "above maximum" or "below minimum"
  local code = kind .. (high and "_above_max_value" or "_below_min_value")
  refuse(string.format(message, path, kind, side, sign, bound, shown(text:sub(at + 1, stop))), path, code)
end

-- The digits of a number whose value is an integer, else nil.
local function whole(literal)
  local sign, integer, fraction, exponent = literal:match("^(-?)(%d+)%.?(%d*)[eE]?([+-]?%d*)$")
  local digits = (integer .. fraction):gsub("^0+", "")
  if digits == "" then
    return "0"
  end
  -- Numbers beyond these exponents are no 64-bit integers, or not integers at all.
  local shift = math.max(-#digits - 1, math.min(64, (tonumber(exponent) or 0) - #fraction))
  if shift >= 0 then
    return sign .. digits .. ("0"):rep(shift)
  end
  if digits:sub(shift) ~= ("0"):rep(-shift) then
    return nil
  end
  return sign .. digits:sub(1, shift - 1)
end

-- Whether an integer's digits are beyond those of a bound of the same sign.
local function beyond(digits, bound)
  return #digits > #bound or (#digits == #bound and digits > bound)
end

local LEAST = { [32] = "-2147483648", [64] = "-9223372036854775808" }
local MOST = { [32] = "2147483647", [64] = "9223372036854775807" }

local function integer(field, path, at, stop, plain)
  local literal = text:sub(at + 1, stop)
  local digits = plain and literal or whole(literal)
  if not digits then
    return wrong_type(path, "an integer", at, stop)
  end
  if not plain then
    table.insert(result.edits, { at, stop, digits })
  end
  -- What the type can hold is the service's to refuse.
  local negative = digits:sub(1, 1) == "-"
  if negative and beyond(digits, LEAST[field.bits]) then
    out_of_range(path, "integer", field, ">=", LEAST[field.bits], at, stop)
  elseif not negative and beyond(digits, MOST[field.bits]) then
    out_of_range(path, "integer", field, "<=", MOST[field.bits], at, stop)
  end
  return stop
end

local LARGEST_FLOAT = 3.4028234663852886e38

local function number(field, path, at, stop)
  local value = tonumber(text:sub(at + 1, stop))
  if math.abs(value) > LARGEST_FLOAT then
    out_of_range(path, "decimal", field, value > 0 and "<=" or ">=", tostring(LARGEST_FLOAT), at, stop)
  end
  return stop
end

local function enum(field, path, at)
  local stop = string_end(at + 1) + 1
  local given = unescaped(text:sub(at + 2, stop - 1))
  for _, value in ipairs(field.values) do
    if value == given then
      return stop
    end
  end
  local message = "Invalid value: '%s'. Supported values are: '%s'."
  refuse(string.format(message, shown(given), table.concat(field.values, "', '")), path, "invalid_value")
  return stop
end

local ESCAPED = { ['"'] = '\\"', ["\\"] = "\\\\" }

-- A value of any type that the service gets as text.
local function json_text(at)
  local stop = skip(at, TEXT_LEVELS)
  local quoted = text:sub(at + 1, stop):gsub('[%c"\\]', function(character)
    return ESCAPED[character] or string.format("\\u%04x", character:byte())
  end)
  table.insert(result.edits, { at, stop, '"' .. quoted .. '"' })
  return stop
end

local object

-- One value of a field: an item of a repeated one.
local function value(field, path, at)
  local kind, wanted = type_at(at), field.type
  if kind == "number" then
    local stop, plain = number_end(at)
    if wanted == "integer" then
      return integer(field, path, at, stop, plain)
    elseif wanted == "number" then
      return number(field, path, at, stop)
    end
    return wrong_type(path, EXPECTED[wanted], at, stop)
  elseif wanted == "json" and kind == "object" then
    return json_text(at)
  elseif wanted == "object" and kind == "object" then
    return object(messages[field.message], path .. ".", at)
  elseif wanted == "enum" and kind == "string" then
    return enum(field, path, at)
  elseif wanted == kind or (wanted == "json" and kind == "string") then
    return skip(at, LEVELS)
  end
  return wrong_type(path, EXPECTED[wanted], at, skip(at, LEVELS))
end

local function array(field, path, at)
  if field.wrapped then
    table.insert(result.edits, { at, at, string.format('{"%s":', field.wrapped) })
  end
  local stop, count = items(at, function(inner, index)
    if index >= (field.max_items or math.huge) then -- too many: the service refuses them
      return skip(inner, LEVELS)
    end
    return value(field, string.format("%s[%d]", path, index), inner)
  end)
  if count == 0 and field.min_items then
    refuse(string.format("Invalid '%s': must not be empty.", path), path, "empty_array")
  end
  if field.wrapped then
    table.insert(result.edits, { stop, stop, "}" })
  end
  return stop
end

local function map(field, path, at)
  local count = 0
  return members(at, path .. ".", function(key, inner)
    count = count + 1
    if count > (field.max_items or math.huge) then
      return skip(inner, LEVELS)
    end
    return value(field, path .. "." .. shown(key), inner)
  end)
end

-- A value that goes to the transcoder as google.protobuf.Value, whose numbers are doubles.
local function any(path, at)
  result.doubles = path
  local stop = skip(at, LEVELS)
  result.doubles = nil
  return stop
end

local function field_value(field, path, at)
  local kind = type_at(at)
  if kind == "null" then
    return literal_end(at)
  elseif field.type == "any" then
    return any(path, at)
  elseif not field.repeated and not field.map then
    return value(field, path, at)
  elseif field.repeated and kind == "array" then
    return array(field, path, at)
  elseif field.map and kind == "object" then
    return map(field, path, at)
  end
  return wrong_type(path, field.map and "an object" or "an array", at, skip(at, LEVELS))
end

function object(message, prefix, at)
  local chosen = {}
  return members(at, prefix, function(key, inner)
    local field, path = message[key], prefix .. shown(key)
    if not field then
      table.insert(result.unknown, path)
      return skip(inner, LEVELS)
    end
    local stop = field_value(field, path, inner)
    if field.one_of and type_at(inner) ~= "null" then
      local other = chosen[field.one_of]
      if other then
        local name = prefix:sub(1, -2)
        refuse(string.format("Invalid '%s': only one of %s and %s may be given.", name, other, key), name, "invalid_value")
      end
      chosen[field.one_of] = key
    end
    if prefix == "" then
      result.given[key] = text:sub(inner + 1, math.min(stop, inner + 5))
    end
    return stop
  end)
end

local function document(message)
  local at = space_end(0)
  local whole_object = bytes[at] == 0x7b
  local stop = space_end(whole_object and object(message, "", at) or skip(at, LEVELS))
  if stop < size then
    expected(stop, "the end of the body")
  end
  if not whole_object then
    refuse("Invalid body: expected a JSON object.", nil, "invalid_type")
  end
end

local function edited()
  local parts, from = {}, 1
  for _, edit in ipairs(result.edits) do
    table.insert(parts, text:sub(from, edit[1]))
    table.insert(parts, edit[3])
    from = edit[2] + 1
  end
  table.insert(parts, text:sub(from))
  return table.concat(parts)
end

-- Reads a body as one of the contract's messages, by its name. Returns a table:
--   fault    why it is refused: message, param and code, and whether it is not JSON; nil if it is not refused
--   unknown  paths of the names that the contract does not have
--   given    the first characters of each member's value, by name
--   body     what the transcoder gets if that is not the text: integers without fraction, and JSON that is sent as text
local function read(body, contract, name)
  messages = contract
  text, size = body, #body
  bytes = ffi.cast("const uint8_t *", text)
  result = { unknown = {}, given = {}, edits = {} }
  local done, failure = pcall(document, messages[name])
  if not done then
    result.fault = type(failure) == "table" and failure or error(failure, 0)
  elseif #result.edits > 0 then
    result.body = edited()
  end
  return result
end

return { read = read }
