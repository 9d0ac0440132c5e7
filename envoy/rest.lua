-- What REST needs around the JSON transcoder. Listed before it: requests pass here first, responses last.

-- The service sees these headers, at most this long, and nothing else that a REST caller sends. Headers become gRPC
-- metadata: more than 8 KiB of it, `grpc-timeout`, `grpc-encoding` or a malformed `*-bin` would break the call.
local FORWARDED = {
  authorization = 4096,
  ["content-type"] = 256,
  -- Looked at once more when the answer goes back.
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

-- Guessing wrong this way is harmless: the event method honours `stream` as parsed and can answer with one body,
-- while the unary method cannot stream. An escaped character could be part of the key.
local function may_stream(text)
  return text:find("stream", 1, true) or text:find("\\u", 1, true)
end

-- The transcoder reads `maxTokens` as `max_tokens`; of both in one body it is not said which counts. A quote within a
-- JSON string is escaped, so what looks like a key is one.
local function given_twice(text)
  local aliased
  for alias in text:gmatch('"(%l+%u%a*)"%s*:') do
    aliased = aliased or {}
    aliased[alias:gsub("%u", "_%0"):lower()] = true
  end
  for name in aliased and text:gmatch('"([%l_]+)"%s*:') or function() end do
    if aliased[name] then
      return name
    end
  end
end

-- The envelope is put around it like around Envoy's own refusals.
local function refuse(handle, message)
  handle:respond({ [":status"] = "400" }, message)
end

-- One that is longer, or of other characters, would not come back as it was sent.
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
    -- Envoy's own: the transcoder starts with a field's path, which is empty for the whole body.
    return (text:gsub('"message":": ', '"message":"', 1))
  end
  local _, last = text:find(DETAIL, 1, true)
  if last then
    return "{" .. text:sub(last + 1, -1 - #CLOSING)
  end
  return unexplained(status)
end

-- The transcoder writes these as escapes, which nobody can read.
local PLAIN = { ["003c"] = "<", ["003e"] = ">", ["0026"] = "&", ["0027"] = "'" }

local function readable(json)
  -- Escapes are taken one after the other, so that an escaped backslash before a `u003e` stays what it is.
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
    -- Another try would only take as long again.
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
    -- So that proxies pass each event on as it comes.
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
