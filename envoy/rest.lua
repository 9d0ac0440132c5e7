-- The parts of the REST API that the JSON transcoder lacks. Listed before it: requests pass here first, responses last.

-- The service gets only these headers of a REST caller, each up to this length in bytes. Headers become gRPC metadata:
-- more than 8 KiB of it, `grpc-timeout`, `grpc-encoding` or a malformed `*-bin` would break the call.
local FORWARDED = {
  authorization = 4096,
  ["content-type"] = 256,
  -- Envoy matches it again when the answer goes back.
  origin = 256,
  ["user-agent"] = 512,
  ["x-client-request-id"] = 512,
  ["x-request-id"] = 64,
  ["x-session-id"] = 256,
  traceparent = 64,
  tracestate = 512,
}

local function drop_headers(headers)
  local dropped = {}
  for name, value in pairs(headers) do
    if name:sub(1, 1) ~= ":" and #value > (FORWARDED[name] or -1) then
      table.insert(dropped, name)
    end
  end
  for _, name in ipairs(dropped) do
    headers:remove(name)
  end
end

-- A false positive is harmless: the streaming method reads the parsed `stream` and can answer with one body, while the
-- unary method cannot stream. An escaped character could be part of the key.
local function may_stream(text)
  return text:find("stream", 1, true) or text:find("\\u", 1, true)
end

-- The transcoder reads `maxTokens` as `max_tokens`, and does not define which counts when a body has both. A quote within
-- a JSON string is escaped, so every match of the patterns is a key.
local function given_twice(text)
  local aliased = {}
  for alias in text:gmatch('"(%l+%u%a*)"%s*:') do
    aliased[alias:gsub("%u", "_%0"):lower()] = true
  end
  if not next(aliased) then
    return nil
  end
  for name in text:gmatch('"([%l_]+)"%s*:') do
    if aliased[name] then
      return name
    end
  end
end

-- The answer gets its envelope as Envoy's own refusals do, in `explain`.
local function refuse(handle, message)
  handle:respond({ [":status"] = "400" }, message)
end

-- A longer id, or one with other characters, could not be sent back unchanged.
local function bad_client_id(id)
  return id and (#id > FORWARDED["x-client-request-id"] or id:find("[^\32-\126]"))
end

function envoy_on_request(handle)
  -- body() invalidates header handles taken before it.
  local method = handle:headers():get(":method")
  local body = method == "POST" and handle:body()
  local text = body and body:getBytes(0, body:length()) or ""
  local headers = handle:headers()
  local client_id = headers:get("x-client-request-id")
  drop_headers(headers)
  if bad_client_id(client_id) then
    headers:remove("x-client-request-id")
    refuse(handle, "Invalid x-client-request-id: it may have at most 512 characters, all of them ASCII.")
    return
  end
  local twice = given_twice(text)
  if twice then
    refuse(handle, string.format("Invalid body: '%s' is given twice, also by its other name.", twice))
    return
  end

  local path = headers:get(":path"):gsub("%?$", ""):gsub("/+$", "")
  handle:streamInfo():dynamicMetadata():set("rest", "path", path)
  if method == "HEAD" then
    handle:streamInfo():dynamicMetadata():set("rest", "head", true)
    headers:replace(":method", "GET")
  end
  if may_stream(text) then
    path = path .. ":stream"
  end
  headers:replace(":path", path)
end

-- How the transcoder prints our error detail within google.rpc.Status. Quotes within JSON strings are escaped, so
-- neither can be part of a message.
local DETAIL = '"details":[{"@type":"type.googleapis.com/completion.v1.ErrorResponse",'
local CLOSING = "]}"

local UNEXPLAINED = {
  ["401"] = { "Invalid or missing API key.", "invalid_request_error" },
  ["403"] = { "You are not allowed to do this.", "invalid_request_error" },
  ["404"] = { "Not found.", "invalid_request_error" },
  ["429"] = { "Too many requests. Please retry later.", "requests" },
  ["499"] = { "The request was cancelled.", "server_error" },
  ["503"] = { "The service is temporarily unavailable. Please retry later.", "server_error" },
  ["504"] = { "The request took too long.", "server_error" },
}

local function unexplained(status)
  local invalid = tonumber(status) < 500
  local fallback = invalid and { "The request could not be processed.", "invalid_request_error" }
    or { "The server had an error while processing the request.", "server_error" }
  local message, kind = unpack(UNEXPLAINED[status] or fallback)
  return string.format('{"error":{"message":"%s","type":"%s","param":null,"code":null}}', message, kind)
end

local function envelope(status, text)
  if text:find('^{"error":') then
    -- The transcoder's own message begins with a field's path, which is empty for the whole body.
    return (text:gsub('"message":": ', '"message":"', 1))
  end
  local _, last = text:find(DETAIL, 1, true)
  if last then
    return "{" .. text:sub(last + 1, -1 - #CLOSING)
  end
  return unexplained(status)
end

-- The transcoder escapes these characters.
local PLAIN = { ["003c"] = "<", ["003e"] = ">", ["0026"] = "&", ["0027"] = "'" }

local function readable(json)
  -- Escapes are matched from left to right, so an escaped backslash before `u003e` stays unchanged.
  return (json:gsub("\\(.)(%x?%x?%x?%x?)", function(kind, digits)
    return kind == "u" and PLAIN[digits] or nil
  end))
end

local function explain(handle, status)
  local body = handle:body(true)
  local json = readable(envelope(status, body:getBytes(0, body:length())))
  handle:headers():replace("content-length", body:setBytes(json))
  handle:headers():replace("content-type", "application/json")
  for name, value in pairs(handle:trailers() or {}) do
    if name:sub(1, 5) ~= "grpc-" then
      handle:headers():replace(name, value)
    end
  end
  if status == "401" then
    handle:headers():replace("www-authenticate", "Bearer")
  elseif (status == "429" or status == "503") and not handle:headers():get("retry-after") then
    handle:headers():replace("retry-after", "1")
  elseif status == "504" then
    -- A retry would take as long again.
    handle:headers():replace("x-should-retry", "false")
  end
end

local function is_head(handle)
  local marks = handle:streamInfo():dynamicMetadata():get("rest")
  return marks and marks.head
end

function envoy_on_response(handle)
  local status = handle:headers():get(":status")
  if tonumber(status) >= 400 then
    explain(handle, status)
  elseif (handle:headers():get("content-type") or ""):find("^text/event%-stream") then
    -- Proxies must pass each event on as it comes.
    handle:headers():replace("cache-control", "no-cache")
    handle:headers():replace("x-accel-buffering", "no")
  end
  for _, name in ipairs({ "grpc-status", "grpc-message", "grpc-accept-encoding" }) do
    handle:headers():remove(name)
  end
  if is_head(handle) then
    local body = handle:body(true)
    local length = body:length()
    body:setBytes("")
    handle:headers():replace("content-length", length)
  end
end
