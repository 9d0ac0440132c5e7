-- The parts of the REST API that the JSON transcoder lacks. Listed before it: requests pass here first, responses last.
local json = dofile("envoy/json.lua")
local contract = dofile("envoy/requests.lua")

-- The service's setting of this name, for its gRPC callers.
local IGNORE_UNKNOWN = os.getenv("COMPLETION_UNKNOWN_PARAMETERS") == "ignore"

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

-- The answer gets its envelope as Envoy's own refusals do, which takes the parameter and the code from the metadata.
local function refuse(handle, fault)
  local metadata = handle:streamInfo():dynamicMetadata()
  for _, name in ipairs({ "param", "code" }) do
    if fault[name] then
      metadata:set("rest", name, fault[name])
    end
  end
  handle:respond({ [":status"] = "400" }, fault.message)
end

-- Names of other APIs and other servers, and what this one has in their place.
local INSTEAD = {
  do_sample = "Use 'temperature': 0 is greedy.",
  ebnf = "Use 'structured_outputs' with 'grammar'.",
  grammar = "Use 'structured_outputs' with 'grammar'.",
  guided_choice = "Use 'structured_outputs' with 'choice'.",
  guided_grammar = "Use 'structured_outputs' with 'grammar'.",
  guided_json = "Use 'structured_outputs' with 'json'.",
  guided_regex = "Use 'structured_outputs' with 'regex'.",
  input = "Use 'prompt'.",
  input_ids = "Use 'prompt' with an array of token ids.",
  inputs = "Use 'prompt'.",
  json_schema = "Use 'response_format' or 'structured_outputs' with 'json'.",
  max_completion_tokens = "Use 'max_tokens'.",
  max_length = "Use 'max_tokens'.",
  max_new_tokens = "Use 'max_tokens'.",
  messages = "This is the completions API: use 'prompt'. There are no chat completions here.",
  min_new_tokens = "Use 'min_tokens'.",
  n_predict = "Use 'max_tokens'.",
  n_probs = "Use 'logprobs'.",
  num_predict = "Use 'max_tokens'.",
  prompt_logprobs = "Use 'logprobs' with 'echo'.",
  prompts = "Use 'prompt', which takes an array.",
  regex = "Use 'structured_outputs' with 'regex'.",
  repeat_penalty = "Use 'repetition_penalty'.",
  return_tokens_as_token_ids = "Use 'return_token_ids'.",
  stop_sequences = "Use 'stop'.",
  stop_words = "Use 'stop'.",
  top_logprobs = "Use 'logprobs' with a number.",
}
local SHOWN_NAMES = 8

-- The refusal of names that the contract does not have.
local function unknown_names(names)
  local listed, instead = {}, ""
  for index, name in ipairs(names) do
    if index <= SHOWN_NAMES then
      table.insert(listed, name)
      instead = instead .. (INSTEAD[name] and " " .. INSTEAD[name] or "")
    end
  end
  local more = #names > SHOWN_NAMES and string.format(" and %d more", #names - SHOWN_NAMES) or ""
  local words = #names == 1 and "argument" or "arguments"
  local message = string.format("Unrecognized request %s supplied: %s%s.%s", words, table.concat(listed, ", "), more, instead)
  return { message = instead == "" and message:sub(1, -2) or message, param = names[1], code = "unknown_parameter" }
end

-- Whether the service renders the answer: as events, or with fields that the transcoder cannot print.
local function rendered(given)
  return given.stream == "true" or given.return_token_ids == "true" or given.logprob_token_ids ~= nil
end

-- Reads a body, and refuses one that is not what the contract says. Returns whether it was refused, and whether the
-- service renders the answer.
local function read(handle, path, body)
  local request = contract.paths[path]
  if not request or not body or body:length() == 0 then
    return false, false
  end
  local done, found = pcall(json.read, body:getBytes(0, body:length()), contract.messages, request)
  if not done then
    -- Envoy would send on what a script that fails has not refused.
    handle:logErr(found)
    handle:respond({ [":status"] = "500" }, "")
    return true, false
  end
  local fault = found.fault
  if #found.unknown > 0 then
    if IGNORE_UNKNOWN then
      handle:streamInfo():dynamicMetadata():set("rest", "ignored", table.concat(found.unknown, ", "):sub(1, 1024))
    elseif not (fault and fault.unreadable) then
      fault = unknown_names(found.unknown)
    end
  end
  if fault then
    refuse(handle, fault)
  elseif found.body then
    body:setBytes(found.body)
  end
  return fault ~= nil, rendered(found.given)
end

-- A longer id, or one with other characters, could not be sent back unchanged.
local function bad_client_id(id)
  return id and (#id > FORWARDED["x-client-request-id"] or id:find("[^\32-\126]"))
end

function envoy_on_request(handle)
  -- body() invalidates header handles taken before it.
  local method = handle:headers():get(":method")
  local body = method == "POST" and handle:body()
  local headers = handle:headers()
  local client_id = headers:get("x-client-request-id")
  drop_headers(headers)
  if bad_client_id(client_id) then
    headers:remove("x-client-request-id")
    local message = "Invalid x-client-request-id: it may have at most 512 characters, all of them ASCII."
    refuse(handle, { message = message, code = "invalid_header" })
    return
  end

  local path = headers:get(":path"):gsub("%?$", ""):gsub("/+$", "")
  handle:streamInfo():dynamicMetadata():set("rest", "path", path)
  if method == "HEAD" then
    handle:streamInfo():dynamicMetadata():set("rest", "head", true)
    headers:replace(":method", "GET")
  end
  local refused, by_service = read(handle, path, body)
  if not refused then
    handle:headers():replace(":path", by_service and path .. ":stream" or path)
  end
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
    return text
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

function envoy_on_response(handle)
  local marks = handle:streamInfo():dynamicMetadata():get("rest") or {}
  local status = handle:headers():get(":status")
  if marks.ignored then
    handle:headers():replace("x-ignored-parameters", marks.ignored)
  end
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
  if marks.head then
    local body = handle:body(true)
    local length = body:length()
    body:setBytes("")
    handle:headers():replace("content-length", length)
  end
end
