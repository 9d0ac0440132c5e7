{{- define "completion-service.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "completion-service.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "completion-service.labels" -}}
{{ include "completion-service.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "completion-service.keys" -}}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.lines -}}
{{- fail "apiKeys: set existingSecret or lines, not both" -}}
{{- end -}}
{{- if not (or .Values.apiKeys.existingSecret .Values.apiKeys.lines) -}}
{{- fail "apiKeys: set existingSecret to a Secret with the entry api_keys, or lines to lines of a key file" -}}
{{- end -}}
{{- .Values.apiKeys.existingSecret | default (printf "%s-keys" (include "completion-service.name" .)) -}}
{{- end -}}

{{- /*
envoy/envoy.yaml of the repository. Other than there are only the address of the service, the longest request, the address of
Envoy's numbers, and the pages: the viewer behind /docs stays out, as Helm keeps a chart with all its files in one object of at
most 1 MiB.
*/ -}}
{{- define "completion-service.envoy" -}}
{{- $text := .Files.Get "files/envoy/envoy.yaml" -}}
{{- $text = replace "&longest_request 600s" (printf "&longest_request %ds" (int .Values.longestRequestSeconds)) $text -}}
{{- if .Values.metrics.enabled -}}
{{- $text = replace "&metrics_host 127.0.0.1" "&metrics_host 0.0.0.0" $text -}}
{{- end -}}
{{- $config := fromYaml $text -}}
{{- $listener := first $config.static_resources.listeners -}}
{{- $manager := (first (first $listener.filter_chains).filters).typed_config -}}
{{- $host := first $manager.route_config.virtual_hosts -}}
{{- $routes := list -}}
{{- range $host.routes -}}
{{- $page := dig "direct_response" "body" "filename" "" . -}}
{{- if not (or (hasPrefix "envoy/static/vendor/" $page) (hasPrefix "envoy/static/docs." $page)) -}}
{{- $routes = append $routes . -}}
{{- end -}}
{{- end -}}
{{- $_ := set $host "routes" $routes -}}
{{- if and .Values.affinity.enabled (not .Values.inferencePool.enabled) -}}
{{- $name := printf "%s-replicas.%s.svc" (include "completion-service.name" .) .Release.Namespace -}}
{{- range $config.static_resources.clusters -}}
{{- if ne .name "admin" -}}
{{- $endpoint := first (first .load_assignment.endpoints).lb_endpoints -}}
{{- $_ := set $endpoint.endpoint.address.socket_address "address" $name -}}
{{- $_ := set . "type" "STRICT_DNS" -}}
{{- /* The service listens on IPv4. A name server that does not answer is asked again at once. */ -}}
{{- $_ := set . "dns_lookup_family" "V4_PREFERRED" -}}
{{- $_ := set . "dns_failure_refresh_rate" (dict "base_interval" "1s" "max_interval" "5s") -}}
{{- end -}}
{{- end -}}
{{- $_ := set (first $config.static_resources.clusters) "lb_policy" "RING_HASH" -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{- define "completion-service.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
{{- end -}}
